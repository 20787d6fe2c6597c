"""A file of one rank in place of another's: what a copy that went wrong leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ckptx.containers.zip_archive import read_members
from ckptx.errors import FormatError
from ckptx.storage.source_file import SourceFile

_TAIL = 1 << 16
"""Bytes at the end of a file: checksums of some 900 tensors, in the directory of its archive."""
_LOOK = 4096
"""Bytes looked at on either end of a tensor."""
_PERIOD = 8
"""Bytes after which a tensor repeats itself whose elements are all the same."""


def refuse_copies(paths: Iterable[Path]) -> None:
    """Raise if two archives, whose ranks have shares of the same weights, are the same.

    Only for files that differ in any model: not for those of data-parallel ranks that hold the
    same. Of those whose ends are equal (torch can be told to leave out checksums) the ends of all
    tensors are compared; files in which every tensor has one value, as padding, may be alike.

    Raises:
        FormatError: two are the same, or one cannot be read.
    """
    seen: dict[tuple[int, bytes], list[Path]] = {}
    for path in paths:
        with SourceFile(path) as file:
            size = min(_TAIL, file.size)
            key = file.size, file.read(file.size - size, size)
        others = seen.setdefault(key, [])
        own = _looked_at(path) if others else None
        for other in others:
            if own is not None and own == _looked_at(other):
                raise FormatError(
                    f"{path}: is a copy of {other}, expected the share of another rank; copy it "
                    "again from where it was saved"
                )
        others.append(path)


def _looked_at(path: Path) -> bytes | None:
    """Return a digest of the ends of all tensors of an archive, None if none has two values."""
    digest, varied = hashlib.sha256(), False
    with SourceFile(path) as file:
        for name, member in read_members(file).items():
            if "/data/" not in name:
                continue
            look = min(_LOOK, member.size)
            for offset in (member.offset, member.offset + member.size - look):
                data = file.read(offset, look)
                varied = varied or data[_PERIOD:] != data[:-_PERIOD]
                digest.update(data)
    return digest.digest() if varied else None
