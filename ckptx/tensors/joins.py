"""Tensors made of tensors: tiles, concatenation, stacking, interleaving and their inverses."""

from __future__ import annotations

from collections.abc import Sequence

from ckptx.errors import PlanError
from ckptx.tensors import lazy
from ckptx.tensors.lazy import LazyTensor, Shape, Stored, replicated, tile_unchecked
from ckptx.tensors.tiling import fault


def tile(shape: Sequence[int], tiles: Sequence[tuple[Sequence[int], LazyTensor]]) -> LazyTensor:
    """Return the tensor of ``shape`` made of ``(origin, tensor)`` tiles.

    Raises:
        PlanError: dtypes or ranks differ, a tile lies outside, or the tiles overlap or leave gaps.
    """
    shape = tuple(shape)
    for origin, part in tiles:
        if not len(origin) == len(part.shape) == len(shape):
            raise PlanError(
                f"tile {list(part.shape)} at {list(origin)} has not as many axes as {list(shape)}"
            )
    tiled = tile_unchecked(shape, tiles)
    if problem := fault(shape, [(tuple(origin), part.shape) for origin, part in tiles], "tile"):
        raise PlanError(problem)
    return tiled


def concat(parts: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Return the parts one after another along ``axis``; the other axes must agree."""
    if not parts:
        raise PlanError("nothing to concatenate")
    first = parts[0]
    first._length(axis)
    tiles: list[tuple[Shape, LazyTensor]] = []
    position = 0
    for part in parts:
        same = (
            len(part.shape) == len(first.shape)
            and part.shape[:axis] == first.shape[:axis]
            and part.shape[axis + 1 :] == first.shape[axis + 1 :]
        )
        if not same:
            raise PlanError(
                f"cannot join {list(part.shape)} to {list(first.shape)} along axis {axis}"
            )
        tiles.append((tuple(position if a == axis else 0 for a in range(len(first.shape))), part))
        position += part.shape[axis]
    shape = (*first.shape[:axis], position, *first.shape[axis + 1 :])
    return tile_unchecked(shape, tiles)


def rejoin(parts: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Return `concat` of what may have been cut from one tensor: then it is that tensor again.

    Examples:
        >>> from ckptx.tensors.lazy import stored
        >>> whole = stored(0, 0, "bfloat16", (6, 4))
        >>> rejoin([whole.narrow(0, 0, 2), whole.narrow(0, 2, 6)]) == whole
        True
    """
    joined = list(parts[:1])
    for part in parts[1:]:
        extent = _extent_of(joined[-1], part, axis)
        joined[-1:] = [joined[-1], part] if extent is None else [extent]
    return concat(joined, axis)


def _extent_of(first: LazyTensor, second: LazyTensor, axis: int) -> LazyTensor | None:
    """Return the extent of which two stored tensors are the halves along ``axis``, if they are."""
    if not (isinstance(first, Stored) and isinstance(second, Stored)):
        return None
    length = first._length(axis)
    size = length + second._length(axis)
    strides = second.strides if length == 1 else first.strides
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    whole = Stored(first.dtype, shape, first.file, first.offset, strides)
    halves = [whole.narrow(axis, 0, length), whole.narrow(axis, length, size)]
    return whole if halves == [first, second] else None


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Return the parts, which have one shape, along a new first axis."""
    return concat([part.unsqueeze() for part in parts])


def unstacked(tensor: LazyTensor) -> list[LazyTensor]:
    """Return the slices of length one along the first axis, in one pass over what is stacked."""
    match tensor:
        case lazy.Tiled(tiles=tiles) if all(part.shape[0] == 1 for _, part in tiles):
            rows: list[list[tuple[Shape, LazyTensor]]] = [[] for _ in range(tensor.shape[0])]
            for origin, part in tiles:
                rows[origin[0]].append(((0, *origin[1:]), part))
            if all(rows):
                return [tile_unchecked((1, *tensor.shape[1:]), row) for row in rows]
        case lazy.Cast(base=base):
            return [row.cast(tensor.dtype) for row in unstacked(base)]
        case lazy.Replicated(copies=copies):
            return [replicated(rows) for rows in zip(*map(unstacked, copies), strict=True)]
    return [tensor.narrow(0, row, row + 1) for row in range(tensor._length(0))]


def interleave(parts: Sequence[LazyTensor], groups: int, axis: int = 0) -> LazyTensor:
    """Return the parts cut into ``groups`` equal pieces each, group by group along ``axis``.

    The result runs: piece 0 of every part, then piece 1 of every part, ... With query, key and
    value and one group per key head it is Megatron's fused attention; with gate and up and one
    group per tensor-parallel rank it is a gated MLP whose ranks were joined as they stand.
    """
    for part in parts:
        if groups < 1 or part._length(axis) % groups:
            raise PlanError(
                f"axis {axis} of {list(part.shape)} does not divide into {groups} groups"
            )
    if groups == 1:
        return concat(parts, axis)
    rows = [part.split(axis, part.shape[axis] // groups) for part in parts]
    return concat(rows, axis + 1).merge(axis)


def deinterleave(
    fused: LazyTensor, sizes: Sequence[int], groups: int, axis: int = 0
) -> list[LazyTensor]:
    """Return the parts that `interleave` fused; ``sizes`` are their lengths along ``axis``."""
    if sum(sizes) != fused.shape[axis]:
        raise PlanError(
            f"axis {axis} of {list(fused.shape)} does not hold parts of {list(sizes)}, "
            f"which sum to {sum(sizes)}"
        )
    if groups < 1 or any(size % groups for size in sizes):
        raise PlanError(f"parts of {list(sizes)} do not divide into {groups} groups")
    if groups != 1:
        fused = fused.split(axis, fused.shape[axis] // groups)
    parts = []
    position = 0
    for size in sizes:
        width = size // groups
        if groups == 1:
            parts.append(fused.narrow(axis, position, position + width))
        else:
            parts.append(fused.narrow(axis + 1, position, position + width).merge(axis))
        position += width
    return parts
