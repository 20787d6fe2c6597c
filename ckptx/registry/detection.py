"""What is found out about a checkpoint while it is opened, so that no file is read twice for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_facts: ContextVar[dict[Hashable, object] | None] = ContextVar("facts", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Let `remembered` keep what it finds until the end of the outermost of these."""
    if _facts.get() is not None:
        yield
        return
    token = _facts.set({})
    try:
        yield
    finally:
        _facts.reset(token)


def remembered(key: Hashable, find: Callable[[], T]) -> T:
    """Return what ``find`` returns, or has returned for ``key`` since the checkpoint is opened."""
    if (facts := _facts.get()) is None:
        return find()
    if key not in facts:
        facts[key] = find()
    found: T = facts[key]  # type: ignore[assignment]  # the key says what it is of
    return found
