"""Plans: what every byte of every output file will be, and the proof that it is complete.

A saver answers the messages of a loader with a `SavePlan`. Its files are divided into regions,
which hold literal bytes, a lazy tensor, or a checksum that is known once a tensor has been written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ckptx.tensors.lazy import LazyTensor


@dataclass(frozen=True, slots=True)
class Crc32:
    """Four bytes, little-endian: the CRC-32 of ``head`` and then ``region`` of the same file."""

    region: int
    head: bytes = b""


Content: TypeAlias = bytes | LazyTensor | Crc32


class Region(NamedTuple):
    """``size`` bytes of a file from ``offset`` bytes on; a tensor lies there row-major."""

    offset: int
    size: int
    content: Content
    name: str = ""
    """The tensor's name in the file, for the manifest and the report."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """An output file: ``path`` below the target, ``size`` in bytes, regions in file order."""

    path: str
    size: int
    regions: Sequence[Region]


def literal_files(files: Mapping[str, bytes], folder: str = "") -> list[FilePlan]:
    """Return the plans of files whose bytes are known; ``folder`` goes before their names."""
    prefix = f"{folder}/" if folder else ""
    return [
        FilePlan(prefix + name, len(data), [Region(0, len(data), data, name)] if data else [])
        for name, data in files.items()
    ]
