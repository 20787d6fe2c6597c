"""Labelled text wrapped to the width of a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
