"""Write the table of Megatron's settings from the sources of its releases.

    python -m tests.versions.megatron_settings SOURCES

``SOURCES`` has a directory per version, named after it, with what its tag or wheel holds:
``megatron/`` and, where there are any, ``examples/multimodal/`` and ``pretrain_*.py``. A wheel of
megatron-core has no ``megatron/training`` up to 0.16; the tags of NVIDIA/Megatron-LM have it:

    git archive core_v0.16.1 -- megatron examples/multimodal | tar x -C SOURCES/0.16.1
    pip download --no-deps --only-binary :all: --python-version 3.12 megatron-core==0.19.2

The sources are parsed, never imported. Names, versions and defaults of `TABLE` are written anew;
the class of a name and the reason for it are judgements and stay. A name without one is given
``unclassified``, which a test refuses.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).parents[2] / "schemas" / "megatron_settings" / "settings.tsv"
HEADER = ("name", "class", "versions", "kind", "defaults", "plain", "reason")
"""``kind``: see `Setting`; ``plain``: the values that change nothing, where others do."""
UNCLASSIFIED = "unclassified"
_BASES = {"TransformerConfig", "ModelParallelConfig"}
_ARGUMENTS = (
    "arguments.py",  # v1.0
    "megatron/arguments.py",
    "megatron/training",
    "megatron/post_training",
    "megatron/rl",
    "examples/multimodal",
)
_ASSIGNED = (*_ARGUMENTS, "megatron", "pretrain_*.py", "*builders.py")


@dataclass
class Setting:
    """A name that a checkpoint's ``args`` or ``run_config`` may have."""

    versions: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    """A field of a TransformerConfig (``config``), of the parser (``argument``), or ``set``."""
    defaults: dict[str, None] = field(default_factory=dict)


def settings_of(tree: Path) -> Mapping[str, Setting]:
    """Return what one version's sources name."""
    found: dict[str, Setting] = {}

    def add(name: str, kind: str, default: ast.expr | None) -> None:
        setting = found.setdefault(name, Setting())
        setting.kinds.add(kind)
        if (text := _literal(default)) is not None:
            setting.defaults[text] = None

    modules = {path: _parsed(path) for path in _python(tree, _ASSIGNED)}
    classes = {
        node.name: node
        for module in modules.values()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }
    made = _classes_of_factories(modules.values())
    for name, node in classes.items():
        if _derives(name, classes) or name in made:
            kind = "config" if _derives(name, classes) else "argument"
            for each, default, aliases in _fields(node):
                add(each, kind, default)
                for alias in aliases:
                    add(alias, "argument", None)
    for path in _python(tree, _ARGUMENTS):
        for call in (n for n in ast.walk(modules[path]) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                name, default = _argument(call)
                if name is not None:
                    add(name, "argument", default)
    for module in modules.values():
        for name in _assigned(module):
            if name not in found:
                add(name, "set", None)
    return found


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except SyntaxError as error:  # v2.6 has a vision task without a colon
        sys.stderr.write(f"{path}: not read: {error}\n")
        return ast.Module([], [])


def _python(tree: Path, places: tuple[str, ...]) -> list[Path]:
    found: dict[Path, None] = {}
    for place in places:
        for path in sorted(tree.glob(place)):
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                found[file] = None
    return list(found)


def _derives(name: str, classes: Mapping[str, ast.ClassDef]) -> bool:
    """Return whether a class is a TransformerConfig or inherits from one."""
    if name in _BASES:
        return True
    node = classes.get(name)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)] if node else []
    return any(base != name and _derives(base, classes) for base in bases)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, list[str]]]:
    """Yield the fields of a dataclass: name, default and further names on the command line."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            continue
        default, aliases = line.value, []
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            words = {word.arg: word.value for word in default.keywords}
            aliases = [
                _destination(text.value)
                for text in ast.walk(words.get("metadata", ast.Constant(None)))
                if isinstance(text, ast.Constant)
                and isinstance(text.value, str)
                and text.value.startswith("--")
                and " " not in text.value
            ]
            default = words.get("default")
        yield line.target.id, default, aliases


def _classes_of_factories(modules: Iterable[ast.Module]) -> set[str]:
    """Return the dataclasses that groups of arguments are made of."""
    return {
        ast.unparse(call.args[0])
        for module in modules
        for call in ast.walk(module)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Factory") and call.args
    }


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _argument(call: ast.Call) -> tuple[str | None, ast.expr | None]:
    """Return the entry of ``args`` that a call of ``add_argument`` makes, and its default."""
    words = {word.arg: word.value for word in call.keywords}
    flags = [one.value for one in call.args if isinstance(one, ast.Constant)]
    long = [flag for flag in flags if isinstance(flag, str) and flag.startswith("--")]
    name: str | None = _destination(long[0]) if long else None
    if isinstance(dest := words.get("dest"), ast.Constant):
        name = str(dest.value)
    default = words.get("default")
    action = words.get("action")
    if default is None and isinstance(action, ast.Constant):
        unset = {"store_true": False, "store_false": True}
        default = ast.Constant(unset[action.value]) if action.value in unset else None
    return name, default if default is not None else ast.Constant(None)


def _assigned(module: ast.Module) -> Iterator[str]:
    """Yield what is set as ``args.NAME = ...`` or with ``setattr(args, 'NAME', ...)``."""
    for node in ast.walk(module):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "args":
                yield target.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            owner, name = node.args[:2]
            if ast.unparse(owner) == "args" and isinstance(name, ast.Constant):
                yield str(name.value)


def _literal(node: ast.expr | None) -> str | None:
    """Return a default as Python spells it, None where it is no plain value."""
    if node is None:
        return None
    try:
        return repr(ast.literal_eval(node))
    except ValueError:
        return None


def read(table: Path = TABLE) -> dict[str, dict[str, str]]:
    """Return the rows of the table, by name."""
    lines = table.read_text().splitlines() if table.is_file() else []
    rows = (dict(zip(HEADER, line.split("\t"), strict=True)) for line in lines[1:])
    return {row["name"]: row for row in rows}


def write(sources: Path, table: Path = TABLE) -> None:
    """Write the table anew; judgements stay."""
    known = read(table)
    found: dict[str, Setting] = {}
    trees = sorted((path for path in sources.iterdir() if path.is_dir()), key=_order)
    for tree in trees:
        for name, setting in settings_of(tree).items():
            total = found.setdefault(name, Setting())
            total.versions.add(tree.name)
            total.kinds |= setting.kinds
            total.defaults |= setting.defaults
    order = [tree.name for tree in trees]
    lines = ["\t".join(HEADER)]
    for name, setting in sorted(found.items()):
        row = known.get(name, {})
        versions = _ranges([version for version in order if version in setting.versions], order)
        kinds = " ".join(sorted(setting.kinds))
        facts = (versions, kinds, " | ".join(setting.defaults))
        judged = (row.get("plain", ""), row.get("reason", ""))
        lines.append("\t".join((name, row.get("class", UNCLASSIFIED), *facts, *judged)))
    table.write_text("\n".join(lines) + "\n")


def _order(tree: Path) -> tuple[bool, list[int]]:
    version = tree.name
    return not version.startswith("v"), [int(part) for part in version.lstrip("v").split(".")]


def _ranges(versions: list[str], order: list[str]) -> str:
    """Return versions as ranges, as ``0.12.3-0.14.0 0.16.1``."""
    places = [order.index(version) for version in versions]
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    ends = [(order[run[0]], order[run[-1]]) for run in runs]
    return " ".join(first if first == last else f"{first}-{last}" for first, last in ends)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
