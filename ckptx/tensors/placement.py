"""Where the elements of a tensor lie: which file holds which box of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckptx.tensors.lazy import Box, LazyTensor, Shape, Stored, contiguous_strides
from ckptx.tensors.pieces import Piece, leaves, pieces


@dataclass(frozen=True, slots=True)
class Shard:
    """What one file holds of a tensor.

    ``file`` indexes the file table; ``box`` is the smallest that holds all ``elements``, in the
    tensor's own axes. Where it has more elements than that, the file holds rows here and there.
    """

    file: int
    box: Box
    elements: int


def placement_of(tensor: LazyTensor) -> list[Shard]:
    """Return what every file holds of a tensor, copies included, in the order of the boxes."""
    found: dict[int, tuple[Box, int]] = {}
    for piece in pieces(tensor, copies=True):
        box = _box(piece, tensor.shape)
        below = (piece.leaf,) if isinstance(piece.leaf, Stored) else leaves(piece.leaf)
        files = {leaf.file for leaf in below if isinstance(leaf, Stored)}
        for file in files:
            known = found.get(file)
            joined = box if known is None else _around(known[0], box)
            found[file] = joined, piece.leaf.numel + (known[1] if known else 0)
    shards = [Shard(file, box, elements) for file, (box, elements) in found.items()]
    return sorted(shards, key=lambda shard: (shard.box, shard.file))


def describe_partition(shape: Shape, shards: Sequence[Shard]) -> str:
    """Return how a tensor is cut, in words; empty where one file holds it whole.

    Examples:
        >>> halves = [Shard(0, ((0, 2), (0, 4)), 8), Shard(1, ((2, 4), (0, 4)), 8)]
        >>> describe_partition((4, 4), halves)
        'cut in 2 along axis 0'
    """
    if not shards:
        return "in no file: filled"
    boxes = list(dict.fromkeys(shard.box for shard in shards))
    copies = len(shards) // len(boxes)
    many = f", {copies} copies each" if copies > 1 and len(shards) == copies * len(boxes) else ""
    whole = tuple((0, size) for size in shape)
    if len(boxes) == 1:
        return f"{copies} copies" if copies > 1 and boxes[0] == whole else ""
    if any(shard.elements != math.prod(b - a for a, b in shard.box) for shard in shards):
        return f"in {len(boxes)} parts, along no axis{many}"
    across = [axis for axis, full in enumerate(whole) if any(box[axis] != full for box in boxes)]
    if len(across) == 1:
        return f"cut in {len(boxes)} along axis {across[0]}{many}"
    counts = [len({box[axis] for box in boxes}) for axis in across]
    if math.prod(counts) == len(boxes):
        grid = " and ".join(
            f"{n} along axis {axis}" for n, axis in zip(counts, across, strict=True)
        )
        return f"cut in {grid}{many}"
    return f"in {len(boxes)} parts{many}"


def stored_dtypes(tensor: LazyTensor) -> tuple[str, ...]:
    """Return the dtypes in which the files hold what a tensor is made of, sorted.

    They are not its own where it is dequantised or widened on the way.
    """
    return tuple(sorted({leaf.dtype for leaf in leaves(tensor) if isinstance(leaf, Stored)}))


def _box(piece: Piece, shape: Shape) -> Box:
    """Return the smallest box of a tensor of this shape that holds a piece of it."""
    strides = contiguous_strides(shape)
    low = _index(piece.offset, shape, strides)
    high = list(low)
    for count, stride in zip(piece.leaf.shape, piece.strides, strict=True):
        if count == 1:
            continue
        axis = next((a for a, own in enumerate(strides) if own <= stride and shape[a] > 1), None)
        step, rest = divmod(stride, strides[axis]) if axis is not None else (0, 1)
        if axis is not None and not rest and high[axis] + (count - 1) * step < shape[axis]:
            high[axis] += (count - 1) * step
            continue
        # A run that goes on in the next row: whole rows from where it starts to where it ends.
        last = _index(piece.offset + (count - 1) * stride, shape, strides)
        first = next(a for a in range(len(shape)) if last[a] != low[a])
        high[first] = max(high[first], last[first])
        for later in range(first + 1, len(shape)):
            low[later], high[later] = 0, shape[later] - 1
    return tuple((start, stop + 1) for start, stop in zip(low, high, strict=True))


def _index(offset: int, shape: Shape, strides: Shape) -> list[int]:
    return [offset // stride % size for stride, size in zip(strides, shape, strict=True)]


def _around(first: Box, second: Box) -> Box:
    """Return the smallest box that holds both."""
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(first, second, strict=True))
