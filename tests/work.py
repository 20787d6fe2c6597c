"""How much a program does, counted in calls: the same on every machine, however busy it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MOST = 10_000_000
"""Calls that no answer to a small input needs; a bomb needs many times as many."""


class TooMuchWorkError(BaseException):
    """More calls than were allowed; nothing of the program under test catches it."""


@contextmanager
def at_most(calls: int = MOST) -> Iterator[None]:
    """Stop what makes more ``calls`` of functions, Python's and built-in ones, in this thread."""
    left = calls

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        left -= event in ("call", "c_call")
        if left < 0:
            sys.setprofile(None)
            raise TooMuchWorkError(f"more than {calls} calls")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
