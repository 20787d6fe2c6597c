"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    "ckptx." + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
    if folder == "ckptx"
    else f"ckptx.{folder}." + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
    for folder in ("ckptx", "plugins", "schemas")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
    and ">>> " in path.read_text()
    and not (
        folder == "ckptx" and {"plugins", "schemas"} & set(path.relative_to(ROOT / folder).parts)
    )
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
