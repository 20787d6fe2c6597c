"""Labelled text wrapped to the width of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

PAGE = 120  # columns; prose is not wider


def wrapped(label: str, text: str, width: int, column: int) -> list[str]:
    """Return ``text`` beside its label, from ``column`` on, broken between words at ``width``."""
    return textwrap.wrap(
        text,
        max(width, 2 * column),
        initial_indent=f"{label:<{column}}",
        subsequent_indent=" " * column,
        break_on_hyphens=False,
        break_long_words=False,  # a path that is cut cannot be copied
    )


def labelled(pairs: Iterable[tuple[str, str]], width: int, column: int = 10) -> list[str]:
    """Return the lines of texts beside their labels, one pair after another."""
    return [line for label, text in pairs for line in wrapped(label, text, width, column)]


def page(width: int) -> int:
    """Return the columns of prose on a terminal of ``width`` columns."""
    return min(max(width, 40), PAGE)
