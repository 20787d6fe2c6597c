"""Plans: what every byte of every output file will be, and the proof that it is complete.

A saver answers the messages of a loader with a `SavePlan`. Its files are divided into regions,
which hold literal bytes, a lazy tensor, or a checksum that is known once a tensor has been written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ckptx.lazy import LazyTensor
from ckptx.protocol import Dropped


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


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Everything a saver will write.

    ``directory`` is the atomic unit below the target that the user named: ``""`` for the target
    itself, ``"release"`` or ``"iter_0000010"`` in a Megatron root. ``pointers`` are small files
    beside it, written last (the tracker file of Megatron). A target that is one file has
    ``single_file`` set and exactly one file plan, whose path is the file's name.
    """

    files: Sequence[FilePlan]
    directory: str = ""
    pointers: Mapping[str, bytes] = field(default_factory=dict)
    single_file: bool = False
    dropped: tuple[Dropped, ...] = ()
    """What the saver leaves behind of the messages it was given: rows of padding."""
    notes: tuple[str, ...] = ()
    stages: Sequence[str] = ()
    """Lines that show which pipeline stage holds which layers."""
    load_hint: str = ""
    """A command or line of code that loads the result."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts for ``plan --json``: parallel sizes, padded vocabulary, ..."""


def literal_files(files: Mapping[str, bytes], folder: str = "") -> list[FilePlan]:
    """Return the plans of files whose bytes are known; ``folder`` goes before their names."""
    prefix = f"{folder}/" if folder else ""
    return [
        FilePlan(prefix + name, len(data), [Region(0, len(data), data, name)] if data else [])
        for name, data in files.items()
    ]
