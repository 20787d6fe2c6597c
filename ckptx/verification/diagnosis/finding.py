"""What a search has found: a mistake, the tensors that it explains, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckptx.errors import first_few

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

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield labels and texts for people."""
        how = f"within the rounding to {self.rounding}" if self.rounding else "to the last bit"
        count = f"{len(self.tensors)} of {self.of} differing tensors, {how}"
        yield "diagnosis", self.title
        yield "explains", f"{count}: {first_few(self.tensors, _SHOWN)}"
        yield from (("data", detail) for detail in self.details)
        yield "advice", self.advice
