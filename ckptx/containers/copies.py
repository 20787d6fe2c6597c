"""A file of one rank in place of another's: what a copy that went wrong leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckptx.containers.source_file import SourceFile
from ckptx.errors import FormatError

_TAIL = 1 << 16
"""Bytes at the end of a file: checksums of some 900 tensors, in the directory of its archive."""


def refuse_copies(paths: Iterable[Path]) -> None:
    """Raise if two of the files, whose ranks have shares of the same weights, are the same file.

    The directory of an archive, which is its end, has a checksum of every tensor. Only for files
    that differ in any model: not for those of data-parallel ranks that hold the same.

    Raises:
        FormatError: two are the same, or one cannot be read.
    """
    seen: dict[tuple[int, bytes], Path] = {}
    for path in paths:
        with SourceFile(path) as file:
            size = min(_TAIL, file.size)
            key = file.size, file.read(file.size - size, size)
        if (other := seen.setdefault(key, path)) != path:
            raise FormatError(
                f"{path}: is a copy of {other}, expected the share of another rank; copy it again "
                "from where it was saved"
            )
