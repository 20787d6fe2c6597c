"""Evaluate lazy tensors by pushing a box down.

`pieces` yields rectangles, each a leaf and its place in the caller's buffer. They exist only while
they are copied: a request for a few rows of a fused weight touches the leaves of those rows.

Shapes, strides, boxes and origins count elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ckptx.tensors.lazy import (
    Box,
    Cast,
    Computed,
    Filled,
    LazyTensor,
    Merged,
    Permuted,
    Replicated,
    Shape,
    Sliced,
    Split,
    Stored,
    Tiled,
    contiguous_strides,
)
from ckptx.tensors.operations import needs


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a leaf and its place in the buffer of the box that was asked for.

    ``leaf`` is a `Stored`, `Filled` or `Cast` tensor, already cut to the rectangle, or a `Sliced`
    one: a box of a `Computed` tensor.
    ``offset`` and ``strides`` count elements of the buffer, one stride per axis of the leaf.
    """

    leaf: LazyTensor
    offset: int
    strides: Shape


def pieces(tensor: LazyTensor, box: Box | None = None, *, copies: bool = False) -> Iterator[Piece]:
    """Yield the rectangles that fill a row-major buffer of ``box`` (by default the whole tensor).

    Every element of the box is yielded exactly once. With ``copies`` the further copies of
    replicated tensors are yielded as well, at the same places.
    """
    if box is None:
        box = tuple((0, n) for n in tensor.shape)
    lengths = tuple(stop - start for start, stop in box)
    if math.prod(lengths):
        yield from _pieces(tensor, box, 0, contiguous_strides(lengths), copies)


def leaves(tensor: LazyTensor, *, computed: bool = True) -> Iterator[LazyTensor]:
    """Yield the stored and filled rectangles that a tensor reads, in no particular order.

    Those below casts are among them, and all copies of replicated tensors. Those below computed
    tensors are, unless ``computed`` is off: then their boxes are yielded instead.
    """
    match tensor:
        case Stored() | Filled():
            if tensor.numel:
                yield tensor
        case Tiled(tiles=tiles):
            for _, part in tiles:
                yield from leaves(part, computed=computed)
        case Replicated(copies=copies):
            for copy in copies:
                yield from leaves(copy, computed=computed)
        case Computed():
            whole = tuple((0, size) for size in tensor.shape)
            box = Sliced(tensor.dtype, tensor.shape, tensor, whole)
            yield from leaves(box, computed=computed)
        case Cast() | Permuted() | Split() | Merged():
            yield from leaves(tensor.base, computed=computed)
        case Sliced(base=Computed() as base, box=inside):
            if not computed:
                yield tensor
                return
            for source, needed in zip(base.inputs, needs(base, inside), strict=True):
                yield from leaves(cut(source, needed))
        case _:
            for piece in pieces(tensor, copies=True):
                yield from leaves(piece.leaf, computed=computed)


def _pieces(
    tensor: LazyTensor, box: Box, offset: int, strides: Shape, copies: bool
) -> Iterator[Piece]:
    match tensor:
        case Replicated():
            for copy in tensor.copies if copies else tensor.copies[:1]:
                yield from _pieces(copy, box, offset, strides, copies)
        case Tiled():
            for origin, part in tensor.tiles:
                inside = []
                place = offset
                for (start, stop), low, size, stride in zip(
                    box, origin, part.shape, strides, strict=True
                ):
                    begin, end = max(start, low), min(stop, low + size)
                    if begin >= end:
                        break
                    inside.append((begin - low, end - low))
                    place += (begin - start) * stride
                else:
                    yield from _pieces(part, tuple(inside), place, strides, copies)
        case Sliced():
            moved = tuple(
                (low + start, low + stop)
                for (start, stop), (low, _) in zip(box, tensor.box, strict=True)
            )
            yield from _pieces(tensor.base, moved, offset, strides, copies)
        case Permuted(axes=axes):
            back = [axes.index(axis) for axis in range(len(axes))]
            moved = tuple(box[place] for place in back)
            yield from _pieces(
                tensor.base, moved, offset, tuple(strides[place] for place in back), copies
            )
        case Split():
            yield from _split_pieces(tensor, box, offset, strides, copies)
        case Merged():
            yield from _merged_pieces(tensor, box, offset, strides, copies)
        case Computed():
            lengths = tuple(stop - start for start, stop in box)
            yield Piece(Sliced(tensor.dtype, lengths, tensor, box), offset, strides)
        case _:
            yield Piece(cut(tensor, box), offset, strides)


def cut(tensor: LazyTensor, box: Box) -> LazyTensor:
    """Return a box of a tensor as a tensor."""
    for axis, (start, stop) in enumerate(box):
        tensor = tensor.narrow(axis, start, stop)
    return tensor


def _split_pieces(
    tensor: Split, box: Box, offset: int, strides: Shape, copies: bool
) -> Iterator[Piece]:
    axis, inner = tensor.axis, tensor.inner
    (row, last_row), (column, last_column) = box[axis], box[axis + 1]
    whole = last_column - column == inner and strides[axis] == inner * strides[axis + 1]
    below = (*strides[:axis], *strides[axis + 1 :])
    runs = (
        [(row * inner, last_row * inner, 0)]
        if whole
        else [
            (r * inner + column, r * inner + last_column, (r - row) * strides[axis])
            for r in range(row, last_row)
        ]
    )
    for start, stop, shift in runs:
        moved = (*box[:axis], (start, stop), *box[axis + 2 :])
        yield from _pieces(tensor.base, moved, offset + shift, below, copies)


def _merged_pieces(
    tensor: Merged, box: Box, offset: int, strides: Shape, copies: bool
) -> Iterator[Piece]:
    axis = tensor.axis
    inner = tensor.base.shape[axis + 1]
    start, stop = box[axis]
    stride = strides[axis]
    above = (*strides[:axis], stride * inner, *strides[axis:])
    position = start
    while position < stop:
        row, column = divmod(position, inner)
        if column or stop - position < inner:  # a partial first or last row
            last = min(inner, column + stop - position)
            rows, columns = (row, row + 1), (column, last)
        else:
            rows, columns = (row, stop // inner), (0, inner)
        moved = (*box[:axis], rows, columns, *box[axis + 1 :])
        yield from _pieces(tensor.base, moved, offset + (position - start) * stride, above, copies)
        position += (rows[1] - rows[0]) * (columns[1] - columns[0])


def flat_boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Yield boxes that cover elements ``start`` to ``stop`` in row-major order, and their places.

    A place is the number of elements between ``start`` and the first element of the box.

    Examples:
        >>> list(flat_boxes((3, 4), 2, 9))
        [(((0, 1), (2, 4)), 0), (((1, 2), (0, 4)), 2), (((2, 3), (0, 1)), 6)]
    """
    strides = contiguous_strides(shape)
    position = start
    while position < stop:
        index = [position // stride % size for stride, size in zip(strides, shape, strict=True)]
        # The widest axis along which whole sub-blocks start here and end before ``stop``.
        axis = len(shape) - 1
        while axis > 0 and not any(index[axis:]) and strides[axis - 1] <= stop - position:
            axis -= 1
        if not shape:
            yield (), 0
            return
        count = min((stop - position) // strides[axis], shape[axis] - index[axis])
        box = tuple(
            (i, i + 1) if a < axis else (i, i + count) if a == axis else (0, n)
            for a, (i, n) in enumerate(zip(index, shape, strict=True))
        )
        yield box, position - start
        position += count * strides[axis]
