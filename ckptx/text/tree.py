"""Tensors listed for people: a tree by the words of their names, alike layers shown once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptx.text.sizes import size_text

_WORDS = re.compile(r": ?|\.|(?<=layer) (?=\d)")
_WIDE_NAMES = 0.45  # the most of a line that names take


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor as it is shown: its name, what it is, where it lies."""

    name: str
    what: str
    """Dtype and shape."""
    cut: str
    """How it is cut, in words; empty if it is not."""
    files: str
    nbytes: int

    @property
    def where(self) -> str:
        """How it is cut and where it lies."""
        return "; ".join(text for text in (self.cut, self.files) if text)


@dataclass(slots=True, eq=False)
class _Node:
    """A word of names, what follows it, and the tensor that ends with it."""

    rows: list[Row] = field(default_factory=list)
    below: dict[str, _Node] = field(default_factory=dict)


def path_of(name: str) -> list[str]:
    """Return the words of a tensor's name.

    Examples:
        >>> path_of("model.layers.0.weight"), path_of("transformer layer 0: qkv weight")
        (['model', 'layers', '0', 'weight'], ['transformer layer', '0', 'qkv weight'])
    """
    return _WORDS.split(name)


def tree(rows: Sequence[Row], width: int, *, fold: bool = True) -> Iterator[str]:
    """Yield the lines of a tree; with ``fold`` neighbours that are alike stand in one line."""
    root = _Node()
    for row in rows:
        node = root
        for word in path_of(row.name):
            node = node.below.setdefault(word, _Node())
        node.rows.append(row)
    _order(root)
    signatures: dict[int, object] = {}
    if fold:
        _sign(root, signatures, {})
    lines = list(_lines(root, 0, signatures))
    names = max((2 * depth + len(label) for depth, label, _ in lines), default=0)
    column = min(names, max(16, int(width * _WIDE_NAMES)))
    for depth, label, detail in lines:
        yield from _line("  " * depth + label, detail, column, width)


def _line(label: str, detail: tuple[str, str] | None, column: int, width: int) -> Iterator[str]:
    if detail is None:
        yield label
        return
    what, where = detail
    if len(label) > column and column + 2 + len(what) > width - len(label) + column:
        yield label
        label = ""
    line = f"{label:<{column}}  {what}"
    if not where or len(line) + 2 + len(where) <= width:
        yield f"{line}  {where}".rstrip()
        return
    yield line.rstrip()
    indent = " " * (len(label) - len(label.lstrip()) + 4)
    yield from textwrap.wrap(
        where,
        max(width, 2 * len(indent)),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _lines(
    node: _Node, depth: int, signatures: Mapping[int, object], *, folded: bool = False
) -> Iterator[tuple[int, str, tuple[str, str] | None]]:
    """Yield depth, label and details of every line below a node; ``folded`` ones name no files."""
    for first, last, count, below in _runs(node, signatures):
        label, one = first if first == last else f"{first}-{last}", below
        while len(one.below) == 1 and not one.rows:  # no line for a word that decides nothing
            ((word, one),) = one.below.items()
            label = f"{label}.{word}"
        alike = f"{count} alike, {size_text(count * _size(below))}" if count > 1 else ""
        within = folded or count > 1
        if not one.rows:
            yield depth, label, (alike, "") if alike else None
        for row in one.rows:
            where = "; ".join(text for text in (row.cut, alike) if text) if within else row.where
            yield depth, label, (row.what, where)
        yield from _lines(one, depth + 1, signatures, folded=within)


def _runs(node: _Node, signatures: Mapping[int, object]) -> Iterator[tuple[str, str, int, _Node]]:
    """Yield neighbours that are alike as one: first and last word, how many, the first's node."""
    run: list[tuple[str, _Node]] = []
    for word, below in node.below.items():
        if run:
            last, one = run[-1]
            follows = word.isdecimal() and last.isdecimal() and int(word) == int(last) + 1
            alike = signatures.get(id(below), below) == signatures.get(id(one), one)
            if not (follows and alike):
                yield run[0][0], run[-1][0], len(run), run[0][1]
                run = []
        run.append((word, below))
    if run:
        yield run[0][0], run[-1][0], len(run), run[0][1]


def _order(node: _Node) -> None:
    """Put numbered words in the order of their numbers: files often have them by the alphabet."""
    if all(word.isdecimal() for word in node.below):
        node.below = dict(sorted(node.below.items(), key=lambda item: int(item[0])))
    for below in node.below.values():
        _order(below)


def _sign(node: _Node, signatures: dict[int, object], known: dict[object, int]) -> int:
    """Give a node and all below it numbers, which are equal for what is alike; return its own."""
    kinds = tuple((row.what, row.cut) for row in node.rows)
    words = tuple((word, _sign(below, signatures, known)) for word, below in node.below.items())
    number = known.setdefault((kinds, words), len(known))
    signatures[id(node)] = number
    return number


def _size(node: _Node) -> int:
    return sum(row.nbytes for row in node.rows) + sum(map(_size, node.below.values()))
