"""Leaves: the parts of 4 MiB in which output tensors are read, hashed and written.

The digests of its leaves make the digest of a tensor independent of threads and order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ckptx.storage.file_plan import FilePlan
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import Cast, Computed, LazyTensor, Sliced, Stored
from ckptx.tensors.operations import ONE_BY_ONE
from ckptx.tensors.pieces import flat_boxes, pieces

LEAF = 4 << 20
"""Bytes of a tensor that one digest covers, and that one step writes."""
BATCH = 32 << 20
"""Bytes of output, and of what is cast to it, that one thread holds at a time."""
_TERMS = 8  # bytes per element of a sum in float32, and of what is added to it
ALIGNMENT = 64
"""Of leaves in memory."""

DIGESTS: dict[str, Callable[[memoryview | bytes], bytes]] = {
    "xxh3_128": lambda data: xxhash.xxh3_128(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
"""Digests of tensors, by the name of their option."""


def tensor_digest(name: str, leaves: Sequence[bytes]) -> str:
    """Return the digest of a tensor, in hexadecimal, from the digests of its 4 MiB leaves."""
    return f"{name}:{DIGESTS[name](b''.join(leaves)).hex()}"


@dataclass(slots=True)
class Output:
    """One output file while it is written."""

    plan: FilePlan
    path: Path
    left: int  # leaves still to write
    leaves: dict[int, list[bytes]]  # region -> digest per leaf
    checksums: dict[int, list[tuple[int, int]]]  # region -> (crc, bytes) per leaf, where needed


@dataclass(frozen=True, slots=True)
class Leaf:
    """A part of a tensor of an output file."""

    number: int  # in the order of the plan
    output: Output
    region: int
    start: int  # elements
    stop: int
    size: int  # bytes
    source: tuple[int, int]  # file, byte: where its first element comes from
    held: int  # bytes that a thread holds for it: its own, and those that a cast reads

    @property
    def tensor(self) -> LazyTensor:
        """The tensor of which it is a part."""
        content = self.output.plan.regions[self.region].content
        assert isinstance(content, LazyTensor)
        return content

    @property
    def begin(self) -> int:
        """The byte of the region's data at which it begins."""
        return self.start * ITEMSIZE[self.tensor.dtype]

    @property
    def place(self) -> tuple[Path, int]:
        """The file, and the byte of it, at which it begins."""
        return self.output.path, self.output.plan.regions[self.region].offset + self.begin


def leaves_of(outputs: Iterable[Output]) -> Iterator[Leaf]:
    """Yield the leaves of all output files, in the order of the plan."""
    places = (
        (output, number, start)
        for output in outputs
        for number, region in enumerate(output.plan.regions)
        if isinstance(region.content, LazyTensor)
        for start in range(0, region.content.numel, LEAF // ITEMSIZE[region.content.dtype])
    )
    for number, (output, region, start) in enumerate(places):
        tensor = output.plan.regions[region].content
        assert isinstance(tensor, LazyTensor)
        itemsize = ITEMSIZE[tensor.dtype]
        stop = min(tensor.numel, start + LEAF // itemsize)
        size = (stop - start) * itemsize
        source, width = _source(tensor, start, stop)
        held = -(-size // ALIGNMENT) * ALIGNMENT + (stop - start) * width
        yield Leaf(number, output, region, start, stop, size, source, held)


def _source(tensor: LazyTensor, start: int, stop: int) -> tuple[tuple[int, int], int]:
    """Return the file and byte from which the first stored element of a range comes.

    The second value is the bytes per element that casts read beside it, 0 without a cast.
    """
    for box, _ in flat_boxes(tensor.shape, start, stop):
        for piece in pieces(tensor, box):
            leaf, width = piece.leaf, 0
            while True:
                match leaf:
                    case Cast(base=base):
                        width += ITEMSIZE[base.dtype]
                        leaf = next(pieces(base)).leaf
                    case Sliced(base=Computed(op=op) as base, box=inside) if op in ONE_BY_ONE:
                        width += ITEMSIZE[base.inputs[0].dtype] + _TERMS
                        leaf = next(pieces(base.inputs[0], inside)).leaf
                    case _:
                        break
            if isinstance(leaf, Stored):
                return (leaf.file, leaf.offset), width
    return (-1, 0), 0


def batches(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """Yield leaves in batches, each of what a thread holds at a time."""
    batch: list[Leaf] = []
    room = BATCH
    for leaf in leaves:
        if batch and leaf.held > room:
            yield batch
            batch, room = [], BATCH
        batch.append(leaf)
        room -= leaf.held
    if batch:
        yield batch
