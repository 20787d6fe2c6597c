"""The one import for authors of plugins."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from ckptx import plugin_api


def test_every_name_is_there_and_what_a_type_checker_sees():
    (typed,) = (
        node
        for node in ast.parse(Path(plugin_api.__file__).read_text()).body
        if isinstance(node, ast.If)
    )
    seen = {
        (node.module, node.names[0].name) for node in typed.body if isinstance(node, ast.ImportFrom)
    }
    homes = plugin_api._HOMES.items()
    assert seen == {(f"ckptx.{home}", name) for home, names in homes for name in names.split()}
    for name in plugin_api.__all__:
        assert getattr(plugin_api, name) is not None
    assert not hasattr(plugin_api, "nothing")


def test_declaring_imports_nothing_heavy():
    code = (
        "import sys; from ckptx.plugin_api import Format;"
        "print([m for m in sys.modules if m.startswith(('numpy', 'pluggy', 'ckptx.tensors'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
