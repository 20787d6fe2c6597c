"""The floors of the house and the direction of dependencies, read from the code itself."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("torch", "transformers", "megatron", "deepspeed")
FLOORS = (
    ("errors", "version"),
    ("tensors", "text", "processes"),
    ("storage", "model"),
    ("containers", "protocol", "registry", "writing"),
    ("hf_models", "schemas", "inspection", "conversion"),
    ("plugins", "verification", "plugin_api"),
    ("testing", "api"),
    ("cli",),
)
"""The rooms of ckptx from the ground up; a module imports from its own floor and those below."""
ROOF = ("__init__", "__main__")
"""Faces of two lines, which nobody imports."""
MODULES = 14
"""The most that a room holds, `__init__` not counted."""
PACKAGES = 15
"""The most at the top of ckptx, the links to plugins and schemas not counted."""
LINKS = ("plugins", "schemas")
RUN_ALONE = ("testing", "verification/frameworks")
"""Where frameworks are imported."""


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere in it, lazily, for types or by a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def files(folder: str) -> list[Path]:
    return [
        path
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not set(LINKS) & set(path.relative_to(ROOT / folder).parts)
    ]


CODE = [*files("ckptx"), *files("plugins"), *files("schemas")]


def room(path: Path) -> str:
    """The room of a file: the first name below ``ckptx``, that of a link for what it leads to."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return first if first in LINKS else rest[0]


def rooms_imported(path: Path) -> set[str]:
    found = (name.split(".") for name in imports(path) if name.startswith("ckptx."))
    return {parts[1] for parts in found} - {room(path)}


FLOOR = {name: number for number, names in enumerate(FLOORS, 1) for name in names}


def test_every_room_has_a_floor():
    there = {path.stem if path.is_file() else path.name for path in (ROOT / "ckptx").iterdir()}
    assert there - {"__pycache__", "py", *ROOF} <= FLOOR.keys()
    packages = {p.name for p in (ROOT / "ckptx").iterdir() if (p / "__init__.py").is_file()}
    assert len(packages - set(LINKS)) <= PACKAGES
    assert len(FLOORS) <= 8


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_above(path):
    if room(path) in ROOF:
        return
    names = {name for name in rooms_imported(path) if name in FLOOR}
    assert not [name for name in names if FLOOR[name] > FLOOR[room(path)]]


def test_rooms_of_a_floor_make_no_circle():
    arrows: dict[str, set[str]] = {}
    for path in CODE:
        if room(path) not in ROOF:
            arrows.setdefault(room(path), set()).update(rooms_imported(path) & FLOOR.keys())
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError


def test_no_room_is_a_hall():
    held = Counter(path.parent for path in CODE if path.name != "__init__.py")
    assert not {str(folder): n for folder, n in held.items() if n > MODULES}


def test_no_file_is_longer_than_500_lines():
    assert not [str(path) for path in CODE if len(path.read_text().splitlines()) > 500]


def test_no_function_is_longer_than_60_lines():
    found = [
        f"{path}: {node.name}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not found


@pytest.mark.parametrize("path", files("ckptx"), ids=str)
def test_the_framework_imports_no_plugin_and_no_schema(path):
    found = [name for name in imports(path) if name.startswith(("ckptx.plugins", "ckptx.schemas"))]
    assert not found or path.name == "contracts.py", found


@pytest.mark.parametrize("path", [*files("schemas")], ids=str)
def test_schemas_import_no_plugin(path):
    assert not [name for name in imports(path) if name.startswith("ckptx.plugins")]


TRAINERS = ("verl", "rlinf", "deepspeed")


@pytest.mark.parametrize("path", files("plugins"), ids=str)
def test_plugins_of_trainers_alone_import_others(path):
    own = path.relative_to(ROOT / "plugins").parts[0]
    named = (name.split(".") for name in imports(path) if name.startswith("ckptx.plugins."))
    found = {parts[2] for parts in named} - {own, "run_directory"}
    assert found <= ({"megatron", "pytorch"} if own in TRAINERS else set())


@pytest.mark.parametrize("path", CODE, ids=str)
def test_frameworks_are_imported_where_they_are_run_alone(path):
    found = {name.partition(".")[0] for name in imports(path)} & set(FOREIGN)
    allowed = path.parent.name == "conversion" and path.name.startswith("megatron_")
    allowed |= path == ROOT / "ckptx/inspection/checkpoint.py"  # LazyTensor.torch()
    running = any(path.is_relative_to(ROOT / "ckptx" / name) for name in RUN_ALONE)
    assert not found or allowed or running, found


@pytest.mark.parametrize("command", [["--help"], ["plugins"], ["convert", "--help"]])
def test_a_command_imports_nothing_heavy(command):
    program = (
        "import sys\n"
        "from ckptx.cli.main import main\n"
        f"sys.argv = ['ckptx', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'safetensors'} & set(sys.modules)\n"
        "heavy |= {m for m in sys.modules if m.startswith('ckptx.plugins.') and m.count('.') > 2}\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_one_engine_plans():
    """Whoever converts goes through `ckptx.conversion.engine`, and nobody else asks a saver."""
    found = [
        str(path.relative_to(ROOT))
        for path in files("ckptx")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "plan"
    ]
    assert found == ["ckptx/conversion/engine.py"]
