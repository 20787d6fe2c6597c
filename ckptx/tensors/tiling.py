"""Do boxes fill a shape exactly once? The proof that no element is missing or double."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import floordiv, le, mod

from ckptx.tensors.lazy import Shape

MAX_SPLITS = 64
"""How often a box may be cut, on average, before a tiling counts as unreasonable."""


def fault(shape: Shape, boxes: Sequence[tuple[Shape, Shape]], what: str = "chunk") -> str:
    """Return what is wrong with a tiling of ``shape`` by ``(offsets, sizes)``; "" if nothing is.

    Boxes may come in any order and need not form a grid; errors call each a ``what``. Empty ones
    count for nothing.

    Examples:
        >>> fault((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 4))])
        ''
        >>> fault((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))])
        'chunks [2, 4] at [0, 0] and [2, 4] at [1, 0] overlap'
        >>> fault((4,), [((0,), (3,))])
        'chunks hold 3 elements, [4] needs 4'
    """
    if _is_grid(shape, boxes):
        return ""
    solid = [box for box in boxes if 0 not in box[1]]
    for offsets, sizes in solid:
        if any(o < 0 or o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)):
            return f"a {what} {list(sizes)} at {list(offsets)} lies outside {list(shape)}"
    budget = [MAX_SPLITS * len(solid) + 4096]
    if (overlap := _overlap(solid, 0, len(shape), budget)) is not None:
        (first, first_sizes), (second, second_sizes) = overlap
        return (
            f"{what}s {list(first_sizes)} at {list(first)} and "
            f"{list(second_sizes)} at {list(second)} overlap"
        )
    if budget[0] < 0:
        return f"{len(solid)} {what}s form no grid that could be checked"
    found = sum(math.prod(sizes) for _, sizes in solid)
    if found != math.prod(shape):
        return f"{what}s hold {found} elements, {list(shape)} needs {math.prod(shape)}"
    return ""


def _is_grid(shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> bool:
    """Return whether boxes of one size lie on all places of a grid: what is usual, told fast."""
    sizes = boxes[0][1] if boxes else ()
    if 0 in sizes or len(sizes) != len(shape) or any(map(mod, shape, sizes)):
        return False
    places = set()
    for offsets, size in boxes:
        if size != sizes or any(map(mod, offsets, sizes)) or any(map(le, shape, offsets)):
            return False
        places.add(offsets)
    grid = math.prod(map(floordiv, shape, sizes))
    return len(places) == len(boxes) == grid and all(min(place, default=0) >= 0 for place in places)


def _overlap(
    boxes: Sequence[tuple[Shape, Shape]], axis: int, axes: int, budget: list[int]
) -> tuple[tuple[Shape, Shape], tuple[Shape, Shape]] | None:
    """Return two boxes that overlap in ``axis`` and all later axes.

    Cuts the axis at every edge of a box; boxes that share a slab are compared along the next axis.
    ``budget`` bounds the number of boxes that are put in slabs.
    """
    if len(boxes) < 2:
        return None
    if axis == axes:
        return boxes[0], boxes[1]
    edges = sorted({edge for o, n in boxes for edge in (o[axis], o[axis] + n[axis])})
    number = {edge: place for place, edge in enumerate(edges)}
    slabs: list[list[tuple[Shape, Shape]]] = [[] for _ in edges]
    for box in boxes:
        first, last = number[box[0][axis]], number[box[0][axis] + box[1][axis]]
        budget[0] -= last - first
        if budget[0] < 0:
            return None
        for place in range(first, last):
            slabs[place].append(box)
    for slab in slabs:
        if (found := _overlap(slab, axis + 1, axes, budget)) is not None:
            return found
    return None
