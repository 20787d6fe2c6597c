"""Compare lazy tensors of two checkpoints block by block, on a few threads, in constant memory.

A block of both sides is read into reused buffers and handed to a visitor. Equal blocks cost one
comparison of bytes; only elements that differ are ever converted to numbers.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.lazy import ITEMSIZE, LazyTensor
from ckptx.reader import Files, Gather, numpy_dtype

_BLOCK = 4 << 20
"""Bytes of the wider side that are compared at a time; each thread holds two such blocks."""
_THREADS = 4
_ALONE = 1 << 20
"""Bytes up to which all pairs together are not worth a second thread."""

Pair: TypeAlias = tuple[LazyTensor, LazyTensor]
"""Two tensors of one shape: one of A, one of B."""
Visit: TypeAlias = Callable[[int, NDArray[Any], NDArray[Any]], bool]
"""Given the number of a pair and a block of both sides, say whether to go on with the pair."""


class Stream:
    """Reads aligned blocks of tensors of two checkpoints.

    ``files`` are the open files of A and of B.
    """

    def __init__(self, files: tuple[Files, Files], threads: int = 0) -> None:
        self.files = files
        self.threads = threads or min(_THREADS, os.cpu_count() or 1)
        self._local = threading.local()

    def each(self, pairs: Sequence[Pair], visit: Visit, sides: tuple[int, int] = (0, 1)) -> None:
        """Call ``visit`` with every block, from any thread, until it says False for the pair.

        ``sides`` are the checkpoints that first and second tensor of the pairs are of.
        """
        stopped = [False] * len(pairs)
        blocks = _blocks(pairs)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                number, start, stop = block
                if stopped[number]:
                    continue
                arrays = [
                    self._read(place, side, tensor, start, stop)
                    for place, (side, tensor) in enumerate(zip(sides, pairs[number], strict=True))
                ]
                if not visit(number, arrays[0], arrays[1]):
                    stopped[number] = True

        if sum(first.nbytes for first, _ in pairs) <= _ALONE:
            work()  # faster than to wake a thread
            return
        with ThreadPoolExecutor(self.threads) as pool:
            for future in [pool.submit(work) for _ in range(self.threads)]:
                future.result()

    def _read(
        self, place: int, side: int, tensor: LazyTensor, start: int, stop: int
    ) -> NDArray[Any]:
        if not hasattr(self._local, "buffers"):
            self._local.gathers = [Gather(files) for files in self.files]
            self._local.buffers = [np.empty(_BLOCK, np.uint8) for _ in range(2)]
        buffer = self._local.buffers[place][: (stop - start) * ITEMSIZE[tensor.dtype]]
        gather = self._local.gathers[side]
        gather.add_range(tensor, start, stop, buffer)
        gather.run()
        array: NDArray[Any] = buffer.view(numpy_dtype(tensor.dtype))
        return array


def _blocks(pairs: Sequence[Pair]) -> Iterator[tuple[int, int, int]]:
    """Yield the number of a pair and a range of its elements, in order."""
    for number, (first, second) in enumerate(pairs):
        step = _BLOCK // max(ITEMSIZE[first.dtype], ITEMSIZE[second.dtype])
        for start in range(0, first.numel, step):
            yield number, start, min(first.numel, start + step)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Which differences count: those above ``atol + rtol * |a|``. Without either, every bit does.

    Tensors of different dtypes differ, unless ``ignore_dtype`` or a tolerance is given: then their
    values are compared in the wider dtype.
    """

    rtol: float = 0.0
    atol: float = 0.0
    ignore_dtype: bool = False

    @property
    def exact(self) -> bool:
        """Whether values must be equal."""
        return not (self.rtol or self.atol)

    @property
    def any_dtype(self) -> bool:
        """Whether equal values of different dtypes are equal."""
        return self.ignore_dtype or not self.exact


@dataclass(slots=True)
class Measured:
    """How far two tensors are apart."""

    differing: int = 0
    """Elements that are not the same."""
    beyond: int = 0
    """Elements that differ by more than the tolerance."""
    max_abs: float = 0.0
    """The largest absolute difference; infinite where one side alone is NaN or infinite."""
    max_rel: float = 0.0
    """The largest difference relative to A; infinite where A is zero."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, differing: int, beyond: int, max_abs: float, max_rel: float) -> None:
        """Add what one block says."""
        with self._lock:
            self.differing += differing
            self.beyond += beyond
            self.max_abs = max(self.max_abs, max_abs)
            self.max_rel = max(self.max_rel, max_rel)


def measure(stream: Stream, pairs: Sequence[Pair], tolerance: Tolerance) -> list[Measured]:
    """Return how far the tensors of each pair are apart."""
    found = [Measured() for _ in pairs]

    def visit(number: int, first: NDArray[Any], second: NDArray[Any]) -> bool:
        if first.dtype == second.dtype and _equal_bytes(first, second):
            return True
        found[number].add(*_distance(first, second, tolerance))
        return True

    stream.each(pairs, visit)
    return found


def same_bits(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where two arrays of one dtype agree in every bit: NaN does, 0.0 and -0.0 do not."""
    size = first.dtype.itemsize
    code = f"u{size}"
    same: NDArray[np.bool_] = first.view(code) == second.view(code)
    return same


def _equal_bytes(first: NDArray[Any], second: NDArray[Any]) -> bool:
    whole = first.nbytes & ~7
    one, other = first.view(np.uint8), second.view(np.uint8)
    return bool(
        np.array_equal(one[:whole].view(np.uint64), other[:whole].view(np.uint64))
        and np.array_equal(one[whole:], other[whole:])
    )


def _distance(
    first: NDArray[Any], second: NDArray[Any], tolerance: Tolerance
) -> tuple[int, int, float, float]:
    """Return differing elements, those beyond the tolerance, and the largest distances."""
    if first.dtype == second.dtype:
        unequal = ~same_bits(first, second)
        first, second = first[unequal], second[unequal]
    a, b = _wide(first), _wide(second)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        distance = np.abs(a - b)
        alike = (a == b) | (np.isnan(a) & np.isnan(b))
        distance = np.where(alike, 0.0, np.where(np.isnan(distance), math.inf, distance))
        size = np.abs(a)
        relative = np.where(distance > 0, distance / size, 0.0)
        relative = np.where(np.isnan(relative), math.inf, relative)
        close = distance <= tolerance.atol + tolerance.rtol * size
    if tolerance.exact:
        # Bits count: 0.0 is not -0.0. Of different dtypes only values can be compared.
        differing = len(a) if first.dtype == second.dtype else int(np.count_nonzero(distance))
        beyond = differing
    else:
        differing = int(np.count_nonzero(distance))
        close &= np.isfinite(distance)
        beyond = len(a) - int(np.count_nonzero(close))
    largest = float(distance.max(initial=0.0))
    return differing, beyond, largest, float(relative.max(initial=0.0))


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    wide = np.complex128 if values.dtype.kind == "c" else np.float64
    return values.astype(wide)
