"""Where a checkpoint lies: what loaders may ask of it, and nothing more.

Only local places exist now, and `pathlib.Path` is one. What is kept elsewhere needs a class with
these members, whose files are read in ranges behind `Location.open`; no loader changes for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, Protocol


class Location(Protocol):
    """A directory or a file: its name, what it holds, its bytes.

    `Path` is one of these by its members; sorting is by name.
    """

    @property
    def name(self) -> str:
        """The last part of the whole name."""

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, the dot included."""

    @property
    def parent(self) -> Location:
        """The directory that holds it."""

    @property
    def parents(self) -> Sequence[Location]:
        """All directories above, the next one first."""

    def __truediv__(self, name: str) -> Location:
        """Return what is called ``name`` in it."""

    def __fspath__(self) -> str: ...

    def __lt__(self, other: Any) -> bool: ...

    def absolute(self) -> Location:
        """Return it by its whole name."""

    def exists(self) -> bool:
        """Return whether anything is there."""

    def is_file(self) -> bool:
        """Return whether a file is there."""

    def is_dir(self) -> bool:
        """Return whether a directory is there."""

    def iterdir(self) -> Iterator[Location]:
        """Yield what a directory holds, in no order."""

    def glob(self, pattern: str) -> Iterator[Location]:
        """Yield what is in or below a directory and has a name of this pattern."""

    def rglob(self, pattern: str) -> Iterator[Location]:
        """Yield what is anywhere below a directory and has a name of this pattern."""

    def stat(self) -> os.stat_result:
        """Return the size of a file, among other facts."""

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open a file to read ranges of bytes."""

    def read_bytes(self) -> bytes:
        """Return all bytes of a small file."""

    def read_text(self, *, errors: str | None = None) -> str:
        """Return all of a small file as text."""
