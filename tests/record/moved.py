"""Prove that a commit only moved code: statement by statement, all is as it was but for imports.

    python tests/record/moved.py OLD NEW    two commits; exit 1 if anything differs

``moves.txt`` says where each module went, and each name that left its module. Every statement at
the top of a module of OLD, imports apart, must stand in the module of NEW that the list gives,
with an equal syntax tree. Texts are compared after the names of modules in them are replaced, and
without regard to line breaks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

LIST = Path(__file__).with_name("moves.txt")
FOLDERS = ("ckptx", "plugins", "schemas")


def read_moves() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Return the new place of each module, and of each name that left its module."""
    modules: dict[str, str] = {}
    names: dict[tuple[str, str], str] = {}
    for line in LIST.read_text().splitlines():
        old, new = line.split()
        module, _, name = old.partition(":")
        if name:
            names[module, name] = new
        else:
            modules[module] = new
    return modules, names


def sources(commit: str) -> dict[str, str]:
    """Return the text of every module of a commit by its dotted name."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", commit], capture_output=True, text=True, check=True
    )
    found = {}
    for name in listed.stdout.split():
        path = PurePosixPath(name)
        if path.suffix != ".py" or (path.parts[0] not in FOLDERS and name != "docs/refresh.py"):
            continue
        parts = list(path.with_suffix("").parts)
        if parts[0] in ("plugins", "schemas"):
            parts.insert(0, "ckptx")
        if parts[-1] == "__init__":
            parts.pop()
        shown = subprocess.run(
            ["git", "show", f"{commit}:{name}"], capture_output=True, text=True, check=True
        )
        found[".".join(parts)] = shown.stdout
    return found


class Plain(ast.NodeTransformer):
    """Takes imports out of a tree, and replaces names that moved."""

    def __init__(self, modules: dict[str, str], names: dict[tuple[str, str], str]) -> None:
        self.modules = modules
        self.names = names
        self.left = {(module.rpartition(".")[2], name) for module, name in names}

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in self.left:
            return ast.Name(node.attr, ast.Load())
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        text = re.sub(r"\bckptx(?:\.[A-Za-z_]\w*)+", self._moved, node.value)
        return ast.Constant(" ".join(text.split()))

    def _moved(self, match: re.Match[str]) -> str:
        parts = match.group().split(".")
        for length in range(len(parts), 0, -1):
            module, rest = ".".join(parts[:length]), parts[length:]
            if module in self.modules:
                new = self.names.get((module, rest[0])) if rest else None
                return ".".join([new or self.modules[module], *rest])
        return match.group()


def statements(text: str, plain: Plain) -> list[tuple[str, str]]:
    """Return name and tree of each statement of a module that is no import."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        target = getattr(node, "targets", [getattr(node, "target", None)])[0]
        if isinstance(target, ast.Tuple):
            target = target.elts[0]
        name = getattr(node, "name", None) or getattr(target, "id", "")
        found.append((name, ast.dump(plain.visit(node))))
    return found


def main(old: str, new: str) -> int:
    """Print what differs between two commits beyond the list; return how much."""
    modules, names = read_moves()
    plain, as_is = Plain(modules, names), Plain({}, {})
    expected: Counter[tuple[str, str]] = Counter()
    for module, text in sources(old).items():
        name = ""
        for own, tree in statements(text, plain):
            name = own or name  # a text below a constant goes where the constant goes
            expected[names.get((module, name), modules.get(module, module)), tree] += 1
    found = Counter(
        (module, tree)
        for module, text in sources(new).items()
        for _, tree in statements(text, as_is)
    )
    added = {key for key in found - expected if not key[1].startswith("Expr(")}  # new docstrings
    for mark, entries in (("-", expected - found), ("+", added)):
        for module, tree in sorted(entries):
            print(mark, module, tree[:300])  # noqa: T201
    print(f"{sum((expected & found).values())} statements are as they were")  # noqa: T201
    return len(expected - found) + len(added)


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
