"""Read lazy tensors: gather boxes of them from files into buffers.

A `Gather` first collects every rectangle that a batch of requests needs and reads them afterwards,
so that requests which lie in each other's gaps share one read. That is what makes row-parallel
weights fast: the columns of eight tensor-parallel ranks are eight strided views of the same bytes.

    a run of bytes here and there      read straight into place
    everything else                    read the covering window once, copy out of it

Reading uses ``preadv`` into reused buffers. Mapping files instead makes the resident size grow with
the checkpoint, and turns a file that shrinks underneath into a fatal signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE, numpy_dtype
from ckptx.tensors.lazy import Box, Cast, Computed, Filled, LazyTensor, Shape, Sliced, Stored
from ckptx.tensors.operations import ONE_BY_ONE, OPERATIONS, needs
from ckptx.tensors.pieces import cut, flat_boxes, pieces

WINDOW = 40 << 20
"""Most bytes that one read of a strided rectangle covers."""
_DIRECT_RUN = 64 << 10  # bytes from which a run is worth a system call of its own
_GAP = 64 << 10  # bytes of gap that are cheaper to read over than to skip
_SPARSE = 1 << 20  # bytes between two steps of one rectangle from which it is read in parts

_UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


@dataclass(slots=True)
class _Request:
    """A rectangle of a file and where it goes; everything in bytes, the innermost run apart."""

    file: int
    offset: int
    counts: Shape  # of the outer axes
    strides: Shape  # in the file
    target_strides: Shape
    target: int  # address in the buffer of the first byte
    run: int  # bytes that lie together on both sides; an element if nothing does
    buffer: NDArray[np.uint8]

    @property
    def span(self) -> int:
        """Bytes from the first to the last byte in the file."""
        outer = zip(self.counts, self.strides, strict=True)
        return sum((count - 1) * stride for count, stride in outer) + self.run


class Gather:
    """Reads a batch of boxes of lazy tensors; one per thread, reused from batch to batch."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._scratch = bytearray()
        self._requests: list[_Request] = []
        self._after: list[Callable[[], None]] = []

    def add_range(
        self, tensor: LazyTensor, start: int, stop: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[Any]:
        """Ask for elements ``start`` to ``stop`` of the row-major order, into a byte buffer.

        Return the elements, which are there once `run` has read them.
        """
        size = (stop - start) * ITEMSIZE[tensor.dtype]
        buffer = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        for box, place in flat_boxes(tensor.shape, start, stop):
            self.add_box(tensor, box, buffer, place)
        return buffer.view(numpy_dtype(tensor.dtype))

    def add_box(
        self, tensor: LazyTensor, box: Box, buffer: NDArray[np.uint8], place: int = 0
    ) -> None:
        """Ask for a box, row-major, at element ``place`` of a byte buffer."""
        itemsize = ITEMSIZE[tensor.dtype]
        for piece in pieces(tensor, box):
            leaf = piece.leaf
            offset = (place + piece.offset) * itemsize
            strides = tuple(stride * itemsize for stride in piece.strides)
            match leaf:
                case Stored():
                    source = tuple(stride * itemsize for stride in leaf.strides)
                    self._requests.append(_request(leaf, source, strides, offset, itemsize, buffer))
                case Filled():
                    view = _view(buffer, leaf.shape, strides, offset, numpy_dtype(leaf.dtype))
                    view[...] = leaf.value
                case Cast():
                    self._add_cast(leaf, strides, offset, buffer)
                case Sliced(base=Computed() as base, box=inside):
                    target = _view(buffer, leaf.shape, strides, offset, numpy_dtype(leaf.dtype))
                    self._add_computed(base, inside, target)

    def run(self) -> None:
        """Read everything that was asked for; the buffers are then complete."""
        requests, self._requests = self._requests, []
        steps, self._after = self._after, []
        windows = []
        for request in requests:
            if not request.counts:
                self._read_run(request)
            elif request.run >= _DIRECT_RUN:
                self._read_runs(request)
            else:
                windows.extend(_bounded(request))
        windows.sort(key=lambda request: (request.file, request.offset))
        self._read_windows(windows)
        for step in steps:  # a cast of a cast comes after it
            step()

    def _add_cast(self, leaf: Cast, strides: Shape, offset: int, buffer: NDArray[np.uint8]) -> None:
        base = leaf.base
        held = self._whole(base)
        target = _view(buffer, leaf.shape, strides, offset, numpy_dtype(leaf.dtype))

        def convert() -> None:
            values = held
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                if (base.dtype, leaf.dtype) == ("float64", "float16"):
                    values = values.astype(np.float32)  # torch rounds twice
                np.copyto(target, values, casting="unsafe")

        self._after.append(convert)

    def _add_computed(self, tensor: Computed, box: Box, target: NDArray[Any]) -> None:
        wanted = zip(tensor.inputs, needs(tensor, box), strict=True)
        parts = [cut(source, needed) for source, needed in wanted]
        inputs: Iterable[NDArray[Any]]
        if tensor.op in ONE_BY_ONE:
            inputs = (read(part, self.files) for part in parts)
        else:
            inputs = [self._whole(part) for part in parts]

        def compute() -> None:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                values = OPERATIONS[tensor.op].evaluate(tensor, box, inputs)
                np.copyto(target, values, casting="unsafe")

        self._after.append(compute)

    def _whole(self, tensor: LazyTensor) -> NDArray[Any]:
        """Ask for a whole tensor; its elements are there once `run` has read them."""
        return self.add_range(tensor, 0, tensor.numel).reshape(tensor.shape)

    def _read_run(self, request: _Request) -> None:
        start = request.target
        memory = request.buffer.data[start : start + request.run]
        self.files.read_into(request.file, request.offset, memory)

    def _read_runs(self, request: _Request) -> None:
        memory = request.buffer.data
        for index in np.ndindex(*request.counts):
            source = request.offset + sum(map(int.__mul__, index, request.strides))
            start = request.target + sum(map(int.__mul__, index, request.target_strides))
            self.files.read_into(request.file, source, memory[start : start + request.run])

    def _read_windows(self, requests: list[_Request]) -> None:
        position = 0
        while position < len(requests):
            first = requests[position]
            start, stop = first.offset, first.offset + first.span
            last = position + 1
            while last < len(requests):
                other = requests[last]
                end = max(stop, other.offset + other.span)
                near = other.file == first.file and other.offset <= stop + _GAP
                if not near or end - start > WINDOW:
                    break
                stop, last = end, last + 1
            if len(self._scratch) < stop - start:
                self._scratch = bytearray(stop - start)
            self.files.read_into(first.file, start, memoryview(self._scratch)[: stop - start])
            window = np.frombuffer(self._scratch, np.uint8)
            for request in requests[position:last]:
                _copy_out(request, window, request.offset - start)
            position = last


def read(tensor: LazyTensor, files: Files | Sequence[str], box: Box | None = None) -> NDArray[Any]:
    """Return a tensor, or a box of it, as a numpy array (ml_dtypes for bfloat16 and float8)."""
    if not isinstance(files, Files):
        with closing(Files(files)) as own:
            return read(tensor, own, box)
    if box is None:
        box = tuple((0, n) for n in tensor.shape)
    shape = tuple(stop - start for start, stop in box)
    buffer = np.empty(math.prod(shape) * ITEMSIZE[tensor.dtype], np.uint8)
    gather = Gather(files)
    gather.add_box(tensor, box, buffer)
    gather.run()
    return buffer.view(numpy_dtype(tensor.dtype)).reshape(shape)


def _request(
    leaf: Stored,
    source: Shape,
    target: Shape,
    offset: int,
    itemsize: int,
    buffer: NDArray[np.uint8],
) -> _Request:
    """Fold axes that are contiguous on both sides, the innermost into the run."""
    axes = [
        (count, here, there)
        for count, here, there in zip(leaf.shape, source, target, strict=True)
        if count != 1
    ]
    run = itemsize
    while axes and axes[-1][1] == run and axes[-1][2] == run:
        run *= axes.pop()[0]
    folded: list[tuple[int, int, int]] = []
    for count, here, there in reversed(axes):
        if folded:
            inner, inner_here, inner_there = folded[-1]
            if (here, there) == (inner * inner_here, inner * inner_there):
                folded[-1] = (inner * count, inner_here, inner_there)
                continue
        folded.append((count, here, there))
    counts, strides, target_strides = zip(*reversed(folded), strict=True) if folded else ((),) * 3
    return _Request(leaf.file, leaf.offset, counts, strides, target_strides, offset, run, buffer)


def _bounded(request: _Request) -> list[_Request]:
    """Return the request in parts whose spans fit a window and hold no wide gaps."""
    if not request.counts:
        return [request]
    axis = max(range(len(request.counts)), key=lambda a: request.strides[a] * request.counts[a])
    count, stride = request.counts[axis], request.strides[axis]
    rest = request.span - (count - 1) * stride
    sparse = stride - rest > _SPARSE
    if request.span <= WINDOW and not sparse:
        return [request]
    step = max(1, (WINDOW - rest) // stride + 1) if rest < WINDOW and not sparse else 1
    parts = []
    for start in range(0, count, step):
        length = min(step, count - start)
        part = replace(
            request,
            offset=request.offset + start * stride,
            counts=(*request.counts[:axis], length, *request.counts[axis + 1 :]),
            target=request.target + start * request.target_strides[axis],
        )
        if length == 1:
            axes = part.counts, part.strides, part.target_strides
            part.counts, part.strides, part.target_strides = (
                (*one[:axis], *one[axis + 1 :]) for one in axes
            )
        parts.extend(_bounded(part))
    return parts


def _copy_out(request: _Request, window: NDArray[np.uint8], start: int) -> None:
    # An element alone is copied as one number; longer runs as bytes, which numpy copies run by run.
    if (unit := _UNSIGNED.get(request.run)) is None:
        shape = (*request.counts, request.run)
        source = _view(window, shape, (*request.strides, 1), start, np.dtype("u1"))
        places = (*request.target_strides, 1)
        target = _view(request.buffer, shape, places, request.target, np.dtype("u1"))
    else:
        source = _view(window, request.counts, request.strides, start, unit)
        target = _view(request.buffer, request.counts, request.target_strides, request.target, unit)
    np.copyto(target, source)


def _view(
    buffer: NDArray[np.uint8], shape: Shape, strides: Shape, offset: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    return np.ndarray(shape, dtype, buffer, offset, strides)
