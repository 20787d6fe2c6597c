r"""Lazy tensors: a small closed algebra of placements, without a tensor library.

A lazy tensor says where its elements come from. The nodes are immutable and picklable; only
`Stored` knows about files. Views of stored bytes fold into strides when they are made, so that
fusing tensors and splitting them again returns the very same leaves.

Evaluation (`ckptx.tensors.pieces`) asks a tensor for a box of its elements; nothing else is ever
materialised.

    concat([q, k, v])            Tiled         box [4:9]
       |   |   |                              /    |    \
    Stored Stored Stored               q[4:8]  k[0:1]   -      pieces

Shapes, strides, boxes and origins count elements; file offsets count bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from ckptx.errors import PlanError
from ckptx.tensors.dtypes import _CAST_TARGETS, _WIDENING, ITEMSIZE

Shape: TypeAlias = tuple[int, ...]
Box: TypeAlias = tuple[tuple[int, int], ...]
"""One ``(start, stop)`` per axis, in elements."""

MAX_AXES = 64
"""How many axes a tensor of a file may have: as many as numpy arrays and torch's loops."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is not there yet: a dtype, a shape, and how to obtain any box of it."""

    dtype: str
    shape: Shape

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.numel * ITEMSIZE[self.dtype]

    def narrow(self, axis: int, start: int, stop: int) -> LazyTensor:
        """Return elements ``start`` to ``stop`` along ``axis``."""
        size = self._length(axis)
        if not 0 <= start <= stop <= size:
            raise PlanError(f"cannot cut [{start}:{stop}] from axis {axis} of {list(self.shape)}")
        if (start, stop) == (0, size):
            return self
        return _narrow(self, axis, start, stop)

    def permute(self, axes: Sequence[int]) -> LazyTensor:
        """Return the tensor with axis ``axes[i]`` moved to place ``i``."""
        axes = tuple(axes)
        if sorted(axes) != list(range(len(self.shape))):
            raise PlanError(f"{list(axes)} does not permute the axes of {list(self.shape)}")
        return self if axes == tuple(range(len(axes))) else _permute(self, axes)

    def split(self, axis: int, inner: int) -> LazyTensor:
        """Return ``axis`` split in two: ``[n, ...]`` becomes ``[n / inner, inner, ...]``."""
        if inner <= 0 or self._length(axis) % inner:
            raise PlanError(
                f"axis {axis} of {list(self.shape)} does not split into rows of {inner}"
            )
        return _split(self, axis, inner)

    def merge(self, axis: int) -> LazyTensor:
        """Return ``axis`` and ``axis + 1`` as one: ``[a, b, ...]`` becomes ``[a * b, ...]``."""
        if not 0 <= axis < len(self.shape) - 1:
            raise PlanError(f"no axis after {axis} to merge with in {list(self.shape)}")
        return _merge(self, axis)

    def cast(self, dtype: str) -> LazyTensor:
        """Return the tensor in another dtype; see `is_widening` for what is exact.

        Raises:
            PlanError: the cast has no one meaning. Torch releases differ in what overflows to in
                float8, which needs scales besides; integers hold indices and flags.
        """
        if dtype not in ITEMSIZE:
            raise PlanError(f"unknown dtype {dtype!r}; known: {', '.join(ITEMSIZE)}")
        if dtype == self.dtype:
            return self
        if self.dtype not in _WIDENING or dtype not in _CAST_TARGETS:
            raise PlanError(f"no cast from {self.dtype} to {dtype}")
        return Cast(dtype, self.shape, self)

    def chunk(self, axis: int, parts: int, index: int) -> LazyTensor:
        """Return part ``index`` of ``parts`` equal parts along ``axis``."""
        size = self._length(axis)
        if parts < 1 or size % parts:
            raise PlanError(f"axis {axis} of {list(self.shape)} does not divide by {parts}")
        return self.narrow(axis, index * size // parts, (index + 1) * size // parts)

    def chunks(self, axis: int, parts: int) -> Sequence[LazyTensor]:
        """Return all ``parts`` equal parts along ``axis``."""
        size = self._length(axis)
        if parts < 1 or size % parts:
            raise PlanError(f"axis {axis} of {list(self.shape)} does not divide by {parts}")
        return _chunks(self, axis, parts) if parts > 1 else [self]

    def squeeze(self) -> LazyTensor:
        """Return the tensor without its first axis, which must have one element."""
        if self.shape[:1] != (1,):
            raise PlanError(f"the first axis of {list(self.shape)} is not 1")
        return self.merge(0)

    def unsqueeze(self) -> LazyTensor:
        """Return the tensor with a first axis of one element."""
        rows = self._length(0)
        return self.split(0, rows) if rows else Filled(self.dtype, (1, *self.shape))

    def _length(self, axis: int) -> int:
        if not 0 <= axis < len(self.shape):
            raise PlanError(f"no axis {axis} in {list(self.shape)}")
        return self.shape[axis]


@dataclass(frozen=True, slots=True)
class Stored(LazyTensor):
    """Elements in a file.

    ``file`` indexes the file table of the conversion (`ckptx.protocol.messages.Begin.files`),
    ``offset`` is in bytes from the start of that file, ``strides`` are in elements. A stride of 0
    repeats.
    """

    file: int
    offset: int
    strides: Shape

    def __post_init__(self) -> None:
        # The stride of an axis with one element means nothing: give it one value, so that equal
        # extents compare equal whatever way they were reached.
        strides = list(self.strides)
        for axis in range(len(strides) - 1, -1, -1):
            if self.shape[axis] == 1:
                inner = axis + 1 < len(strides)
                strides[axis] = self.shape[axis + 1] * strides[axis + 1] if inner else 1
        object.__setattr__(self, "strides", tuple(strides))


@dataclass(frozen=True, slots=True)
class Filled(LazyTensor):
    """Elements of one value, in no file: padding."""

    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Replicated(LazyTensor):
    """Equal copies of one tensor: the first is read, the others are compared with it."""

    copies: tuple[LazyTensor, ...]


@dataclass(frozen=True, slots=True)
class Tiled(LazyTensor):
    """Tensors side by side in a larger one: ``(origin, tensor)`` tiles that cover it once."""

    tiles: tuple[tuple[Shape, LazyTensor], ...]


@dataclass(frozen=True, slots=True)
class Sliced(LazyTensor):
    """A box of a tensor whose view does not fold any further."""

    base: LazyTensor
    box: Box


@dataclass(frozen=True, slots=True)
class Permuted(LazyTensor):
    """A tensor with its axes in another order."""

    base: LazyTensor
    axes: Shape


@dataclass(frozen=True, slots=True)
class Split(LazyTensor):
    """A tensor with one axis split in two."""

    base: LazyTensor
    axis: int
    inner: int


@dataclass(frozen=True, slots=True)
class Merged(LazyTensor):
    """A tensor with two neighbouring axes merged into one."""

    base: LazyTensor
    axis: int


@dataclass(frozen=True, slots=True)
class Cast(LazyTensor):
    """A tensor in another dtype."""

    base: LazyTensor


@dataclass(frozen=True, slots=True)
class Computed(LazyTensor):
    """A tensor computed from others; `ckptx.tensors.operations` knows how, by the name ``op``."""

    op: str
    inputs: tuple[LazyTensor, ...]
    params: tuple[int, ...] = ()


@lru_cache(maxsize=4096)
def contiguous_strides(shape: Shape) -> Shape:
    """Return the strides, in elements, of a row-major tensor.

    Examples:
        >>> contiguous_strides((2, 3, 4))
        (12, 4, 1)
    """
    # Numbers of numpy equal Python's: what is kept for one is given to the other.
    shape = tuple(map(int, shape))
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def stored(file: int, offset: int, dtype: str, shape: Sequence[int]) -> Stored:
    """Return a row-major tensor whose bytes start at ``offset`` bytes of file number ``file``."""
    shape = tuple(shape)
    return Stored(dtype, shape, file, offset, contiguous_strides(shape))


def tile_unchecked(shape: Shape, tiles: Sequence[tuple[Sequence[int], LazyTensor]]) -> LazyTensor:
    """Return tiles that are known to cover the shape once as a tensor."""
    if not tiles:
        raise PlanError("a tensor cannot be made of no tiles")
    dtypes = sorted({part.dtype for _, part in tiles})
    if len(dtypes) > 1:
        found = ", ".join(dtypes)
        raise PlanError(
            f"tiles of one tensor have different dtypes: {found}; --dtype can give them one"
        )
    kept = [(tuple(origin), part) for origin, part in tiles if part.numel]
    if not kept:
        return Filled(dtypes[0], shape)
    if len(kept) == 1:
        return kept[0][1]
    return Tiled(dtypes[0], shape, tuple(sorted(kept, key=lambda entry: entry[0])))


def replicated(copies: Sequence[LazyTensor]) -> LazyTensor:
    """Return one tensor that is stored several times; the copies must agree in shape and dtype."""
    if not copies:
        raise PlanError("no copies of a tensor")
    first = copies[0]
    if len(copies) == 1:
        return first
    for copy in copies[1:]:
        if (copy.shape, copy.dtype) != (first.shape, first.dtype):
            raise PlanError(
                f"copies of one tensor differ: {first.dtype} {list(first.shape)} "
                f"and {copy.dtype} {list(copy.shape)}"
            )
    flat = [
        c for copy in copies for c in (copy.copies if isinstance(copy, Replicated) else (copy,))
    ]
    distinct = tuple(dict.fromkeys(flat))
    return distinct[0] if len(distinct) == 1 else Replicated(first.dtype, first.shape, distinct)


def _narrow(tensor: LazyTensor, axis: int, start: int, stop: int) -> LazyTensor:
    length = stop - start
    shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
    match tensor:
        case Stored():
            shift = start * tensor.strides[axis] * ITEMSIZE[tensor.dtype]
            return Stored(tensor.dtype, shape, tensor.file, tensor.offset + shift, tensor.strides)
        case Filled():
            return replace(tensor, shape=shape)
        case Cast():
            return Cast(tensor.dtype, shape, tensor.base.narrow(axis, start, stop))
        case Replicated():
            return replicated([copy.narrow(axis, start, stop) for copy in tensor.copies])
        case Tiled():
            return _narrow_tiles(tensor, axis, start, stop, shape)
        case Split(axis=split_axis) if (
            axis == split_axis + 1 and tensor.shape[split_axis] == 1 and length
        ):
            return tensor.base.narrow(split_axis, start, stop).split(split_axis, length)
        case Split(axis=split_axis, inner=inner) if axis != split_axis + 1:
            # Cutting whole rows, or another axis, commutes with the split.
            if axis == split_axis:
                return tensor.base.narrow(axis, start * inner, stop * inner).split(axis, inner)
            below = axis if axis < split_axis else axis - 1
            return tensor.base.narrow(below, start, stop).split(split_axis, inner)
        case Merged(axis=merged_axis) if axis != merged_axis:
            below = axis if axis < merged_axis else axis + 1
            return tensor.base.narrow(below, start, stop).merge(merged_axis)
        case Merged() if not start % (inner := tensor.base.shape[axis + 1]) and not stop % inner:
            return tensor.base.narrow(axis, start // inner, stop // inner).merge(axis)
        case Permuted(axes=axes):
            return tensor.base.narrow(axes[axis], start, stop).permute(axes)
        case Sliced():
            low = tensor.box[axis][0]
            box = (*tensor.box[:axis], (low + start, low + stop), *tensor.box[axis + 1 :])
            return Sliced(tensor.dtype, shape, tensor.base, box)
        case _:
            return Sliced(tensor.dtype, shape, tensor, _box(tensor.shape, axis, start, stop))


def _chunks(tensor: LazyTensor, axis: int, parts: int) -> Sequence[LazyTensor]:
    """Return equal parts as `_narrow` does, in one pass for what thousands of experts are."""
    whole = tensor.shape
    length = whole[axis] // parts
    shape = (*whole[:axis], length, *whole[axis + 1 :])
    match tensor:
        case Computed(dtype=dtype):
            bounds = [(number * length, (number + 1) * length) for number in range(parts)]
            boxes = [_box(whole, axis, start, stop) for start, stop in bounds]
            return [Sliced(dtype, shape, tensor, box) for box in boxes]
        case Split(dtype=dtype, base=Computed() as base, axis=split, inner=inner) if (
            axis > split + 1 or (axis == split + 1 and whole[split] == 1 and length)
        ):
            rows = length if axis == split + 1 else inner
            below = _chunks(base, axis - 1, parts)
            return [Split(dtype, shape, part, split, rows) for part in below]
    return [_narrow(tensor, axis, n * length, (n + 1) * length) for n in range(parts)]


@lru_cache(maxsize=4096)
def _box(shape: Shape, axis: int, start: int, stop: int) -> Box:
    """Return the box that is cut along one axis; thousands of experts share it."""
    cut = int(start), int(stop)
    return tuple(cut if a == axis else (0, int(n)) for a, n in enumerate(shape))


def _narrow_tiles(tensor: Tiled, axis: int, start: int, stop: int, shape: Shape) -> LazyTensor:
    tiles = []
    for origin, part in tensor.tiles:
        low = max(start, origin[axis])
        high = min(stop, origin[axis] + part.shape[axis])
        if low < high:
            moved = (*origin[:axis], low - start, *origin[axis + 1 :])
            tiles.append((moved, part.narrow(axis, low - origin[axis], high - origin[axis])))
    if not tiles:
        return Filled(tensor.dtype, shape)
    return tile_unchecked(shape, tiles)


def _permute(tensor: LazyTensor, axes: Shape) -> LazyTensor:
    shape = tuple(tensor.shape[axis] for axis in axes)
    match tensor:
        case Stored():
            strides = tuple(tensor.strides[axis] for axis in axes)
            return Stored(tensor.dtype, shape, tensor.file, tensor.offset, strides)
        case Filled():
            return replace(tensor, shape=shape)
        case Cast():
            return Cast(tensor.dtype, shape, tensor.base.permute(axes))
        case Replicated():
            return replicated([copy.permute(axes) for copy in tensor.copies])
        case Tiled():
            moved = [
                (tuple(origin[axis] for axis in axes), part.permute(axes))
                for origin, part in tensor.tiles
            ]
            return tile_unchecked(shape, moved)
        case Permuted():
            return tensor.base.permute([tensor.axes[axis] for axis in axes])
        case _:
            return Permuted(tensor.dtype, shape, tensor, axes)


def _split(tensor: LazyTensor, axis: int, inner: int) -> LazyTensor:
    outer = tensor.shape[axis] // inner
    shape = (*tensor.shape[:axis], outer, inner, *tensor.shape[axis + 1 :])
    match tensor:
        case Stored():
            stride = tensor.strides[axis]
            strides = (*tensor.strides[:axis], stride * inner, stride, *tensor.strides[axis + 1 :])
            return Stored(tensor.dtype, shape, tensor.file, tensor.offset, strides)
        case Filled():
            return replace(tensor, shape=shape)
        case Cast():
            return Cast(tensor.dtype, shape, tensor.base.split(axis, inner))
        case Replicated():
            return replicated([copy.split(axis, inner) for copy in tensor.copies])
        case Merged(axis=merged) if merged == axis and tensor.base.shape[axis + 1] == inner:
            return tensor.base
        case Tiled() if all(
            not origin[axis] % inner and not part.shape[axis] % inner
            for origin, part in tensor.tiles
        ):
            tiles = [
                (
                    (*origin[:axis], origin[axis] // inner, 0, *origin[axis + 1 :]),
                    part.split(axis, inner),
                )
                for origin, part in tensor.tiles
            ]
            return tile_unchecked(shape, tiles)
        case _:
            return Split(tensor.dtype, shape, tensor, axis, inner)


def _merge(tensor: LazyTensor, axis: int) -> LazyTensor:
    outer, inner = tensor.shape[axis : axis + 2]
    shape = (*tensor.shape[:axis], outer * inner, *tensor.shape[axis + 2 :])
    match tensor:
        case Stored(strides=strides) if (
            outer == 1 or inner == 1 or strides[axis] == strides[axis + 1] * inner
        ):
            stride = strides[axis] if inner == 1 else strides[axis + 1]
            merged = (*strides[:axis], stride, *strides[axis + 2 :])
            return Stored(tensor.dtype, shape, tensor.file, tensor.offset, merged)
        case Filled():
            return replace(tensor, shape=shape)
        case Cast():
            return Cast(tensor.dtype, shape, tensor.base.merge(axis))
        case Replicated():
            return replicated([copy.merge(axis) for copy in tensor.copies])
        case Split(axis=split_axis, inner=width) if split_axis == axis and width == inner:
            return tensor.base
        case Tiled() if all(
            part.shape[axis] == 1 or part.shape[axis + 1] == inner for _, part in tensor.tiles
        ):
            tiles = [
                (
                    (*origin[:axis], origin[axis] * inner + origin[axis + 1], *origin[axis + 2 :]),
                    part.merge(axis),
                )
                for origin, part in tensor.tiles
            ]
            return tile_unchecked(shape, tiles)
        case _:
            return Merged(tensor.dtype, shape, tensor, axis)
