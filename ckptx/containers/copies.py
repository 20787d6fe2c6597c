"""A file of one rank in place of another's: what a copy that went wrong leaves behind.

Two ranks may honestly hold the same bytes: padding of the vocabulary, weights that every rank
holds whole, experts that were all made from one dense layer, layers that a merge has repeated. So
that two files are alike is not enough for a refusal; the caller says what only a copy gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from ckptx.containers.zip_archive import read_members
from ckptx.errors import FormatError
from ckptx.storage.location import Location
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.lazy import LazyTensor

_TAIL = 1 << 16
"""Bytes at the end of a file: checksums of some 900 tensors, in the directory of its archive."""
_LOOK = 4096
"""Bytes looked at on either end of a tensor."""
_PERIOD = 8
"""Bytes after which a tensor repeats itself whose elements are all the same."""
_EVIDENCE = 16
"""Differing bytes of two rows: so many do not come again by chance."""


def refuse_copies(paths: Sequence[Location]) -> None:
    """Raise if two archives, whose ranks share out the same weights, are the same.

    Raises:
        FormatError: two are, or one cannot be read.
    """
    for one, other in alike(paths):
        raise copy_of(paths[other], paths[one])


def copy_of(path: Location, other: Location) -> FormatError:
    """Return the error of a file that is a copy of another rank's."""
    return FormatError(
        f"{path}: is a copy of {other}, expected the share of another rank; copy it again from "
        "where it was saved"
    )


def alike(paths: Sequence[Location]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of two archives that hold the same, the earlier first.

    Of those whose ends are equal (torch can be told to leave out checksums) the ends of all
    tensors are compared. Files in which every tensor has one value, as padding, are left out.
    """
    seen: dict[tuple[int, bytes], list[int]] = {}
    for number, path in enumerate(paths):
        with SourceFile(path) as file:
            size = min(_TAIL, file.size)
            key = file.size, file.read(file.size - size, size)
        others = seen.setdefault(key, [])
        own = _looked_at(path) if others else None
        for other in others:
            if own is not None and own == _looked_at(paths[other]):
                yield other, number
        others.append(number)


def rows_differ(paths: Sequence[Location], weights: Iterable[LazyTensor]) -> bool:
    """Return whether any weight, [rows, columns], has rows that are not all alike.

    The first two of at least four rows are compared: those are of one part of a fused weight.
    Where they differ, no honest rank with other rows of the weight holds the same file.
    """
    from ckptx.storage.gather import read

    files = [str(path) for path in paths]
    for weight in weights:
        if len(weight.shape) == 2 and weight.shape[0] >= 4:
            columns = min(weight.shape[1], _LOOK)
            one, other = (
                read(weight.narrow(0, row, row + 1).narrow(1, 0, columns), files).tobytes()
                for row in (0, 1)
            )
            if sum(a != b for a, b in zip(one, other, strict=True)) >= _EVIDENCE:
                return True
    return False


def _looked_at(path: Location) -> bytes | None:
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
