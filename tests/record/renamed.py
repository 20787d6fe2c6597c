"""Prove that a commit only renamed: the trees of two commits are equal but for listed names.

    python tests/record/renamed.py OLD NEW    two commits; exit 1 if anything differs

``renames.txt`` pairs old names and new. The modules of both commits are walked side by side; where
a name differs, the list must have the pair. Texts and imports are not compared.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from moved import sources

LIST = Path(__file__).with_name("renames.txt")


def differences(old: object, new: object, pairs: set[tuple[str, str]]) -> Iterator[str]:
    """Yield what differs between two trees beyond the pairs."""
    if isinstance(old, ast.Constant) and isinstance(old.value, str):
        same = isinstance(new, ast.Constant) and isinstance(new.value, str)
    elif isinstance(old, ast.AST):
        same = type(old) is type(new)
        for field in old._fields if same else ():
            yield from differences(getattr(old, field), getattr(new, field), pairs)
    elif isinstance(old, list) and isinstance(new, list):
        one, other = ([n for n in nodes if not _imports(n)] for nodes in (old, new))
        same = len(one) == len(other)
        for first, second in zip(one, other, strict=False):
            yield from differences(first, second, pairs)
    else:
        same = old == new or (old, new) in pairs
    if not same:
        yield f"{old!r:.80} is {new!r:.80}"


def _imports(node: object) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def main(old: str, new: str) -> int:
    """Print what differs between two commits beyond the list; return how much."""
    pairs = {(a, b) for a, b in (line.split() for line in LIST.read_text().splitlines())}
    before, after = sources(old), sources(new)
    found = [f"{name}: in one commit only" for name in before.keys() ^ after.keys()]
    for name in sorted(before.keys() & after.keys()):
        trees = ast.parse(before[name]), ast.parse(after[name])
        found += [f"{name}: {text}" for text in differences(*trees, pairs)]
    for line in found:
        print(line)  # noqa: T201
    print(f"{len(before)} modules compared")  # noqa: T201
    return len(found)


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
