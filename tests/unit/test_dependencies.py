"""What is imported is what is declared, and the lower bounds are those that CI tries."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptx.conversion.megatron_modules import ModuleLoader
from ckptx.errors import PluginError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FRAMEWORKS = "ckptx/verification/frameworks/"
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "megatron": "megatron-core",
    "_pytest": "pytest",
}


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def third_party() -> Iterator[tuple[str, str, bool]]:
    """Yield distribution, file and whether it is imported where the file is: not in a function."""
    for folder in ("ckptx", "plugins", "schemas"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if file.startswith(("ckptx/plugins/", "ckptx/schemas/")):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                for module in imported(node):
                    top = module.partition(".")[0]
                    if top != "ckptx" and top not in sys.stdlib_module_names:
                        yield DISTRIBUTIONS.get(top, top), file, node.col_offset == 0


def imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0, module=module):
            return [module]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
            args=[ast.Constant(value=module), *_],
        ):
            return [module]
    return []


EXTRAS = {name_of(one) for extra in PROJECT["optional-dependencies"].values() for one in extra} - {
    "ckptx"
}
DECLARED = {name_of(one) for one in PROJECT["dependencies"]}


def test_everything_that_is_declared_is_imported_and_nothing_else():
    found = {name for name, file, _ in third_party() if not file.startswith("ckptx/testing/")}
    assert found - EXTRAS == DECLARED - EXTRAS
    assert not DECLARED & EXTRAS
    assert found <= DECLARED | EXTRAS


def test_what_an_extra_brings_is_imported_late():
    eager = {(name, file) for name, file, top in third_party() if top and name in EXTRAS}
    elsewhere = {one for one in eager if not one[1].startswith((FRAMEWORKS, "ckptx/testing/"))}
    assert not elsewhere, "a conversion imports it"


def test_lower_bounds_are_those_that_are_tried():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in PROJECT["dependencies"]:
        name, bound = requirement.split(">=")
        parts = [[int(part) for part in version.split(".")] for version in (bound, tried[name])]
        assert parts[0] == parts[1][: len(parts[0])], requirement
        assert not any(parts[1][len(parts[0]) :]), requirement


def test_a_module_of_megatrons_without_torch_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PluginError) as caught:
        ModuleLoader("old", "loader_old", None)
    assert str(caught.value).endswith("torch; it is not installed: pip install 'ckptx[run]'")
    assert "\n" not in str(caught.value)
