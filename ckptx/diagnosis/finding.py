"""What a search has found: a mistake, the tensors that it explains, and what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SHOWN = 3  # tensors in the text form


@dataclass(frozen=True, slots=True)
class Finding:
    """One explanation, and the tensors that it holds for, without exception."""

    mistakes: tuple[str, ...]
    """Stable names, ``"gate-up-exchanged"``; several where they were made at once."""
    title: str
    details: tuple[str, ...]
    """What happened, in words that follow the data: which rows, which order."""
    advice: str
    tensors: tuple[str, ...]
    of: int
    """The number of tensors that differ in all, missing ones included."""
    rounding: str = ""
    """What the values were rounded to; empty where every bit is explained."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "mistakes": list(self.mistakes),
            "title": self.title,
            "details": list(self.details),
            "advice": self.advice,
            "explains": list(self.tensors),
            "of": self.of,
            "exact": not self.rounding,
            "rounding": self.rounding,
        }

    def render(self, width: int) -> Iterator[str]:
        """Yield the finding as lines of at most ``width`` columns."""
        how = f"within the rounding to {self.rounding}" if self.rounding else "to the last bit"
        count = f"explains {len(self.tensors)} of {self.of} differing tensors, {how}"
        yield from _wrapped("diagnosis:", self.title, width)
        yield from _wrapped("", f"{count}: {self._some()}", width)
        for detail in self.details:
            yield from _wrapped("", detail, width)
        yield from _wrapped("", self.advice, width)

    def _some(self) -> str:
        rest = len(self.tensors) - _SHOWN
        return ", ".join(self.tensors[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=f"{label:<11}",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
        break_long_words=False,
    )
