"""The direction of dependencies, and what stays unimported, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("torch", "transformers", "megatron", "deepspeed")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    return [
        path
        for path in (ROOT / folder).rglob("*.py")
        if not {"plugins", "schemas"} & set(path.relative_to(ROOT / folder).parts)
    ]


@pytest.mark.parametrize("path", files("ckptx"), ids=str)
def test_the_framework_imports_no_plugin_and_no_schema(path):
    found = [name for name in imports(path) if name.startswith(("ckptx.plugins", "ckptx.schemas"))]
    assert not found or path.name == "contracts.py", found


@pytest.mark.parametrize("path", [*files("schemas")], ids=str)
def test_schemas_import_no_plugin(path):
    assert not [name for name in imports(path) if name.startswith("ckptx.plugins")]


@pytest.mark.parametrize("path", [*files("schemas"), *files("plugins"), *files("ckptx")], ids=str)
def test_frameworks_are_imported_where_they_are_run_alone(path):
    found = {name.partition(".")[0] for name in imports(path)} & set(FOREIGN)
    allowed = path.parent.name == "conversion" and path.name.startswith("megatron_")
    running = any(
        path.is_relative_to(ROOT / "ckptx" / name)
        for name in ("testing", "verification/frameworks")
    )
    assert not found or allowed or running, found


@pytest.mark.parametrize("command", [["--help"], ["plugins"], ["convert", "--help"]])
def test_a_command_imports_nothing_heavy(command):
    program = (
        "import sys\n"
        "from ckptx.cli.main import main\n"
        f"sys.argv = ['ckptx', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
