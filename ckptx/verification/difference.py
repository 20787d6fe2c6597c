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
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.gather import Gather, numpy_dtype
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor

_BLOCK = 4 << 20
"""Bytes of the wider side that are compared at a time; each thread holds two such blocks."""
_THREADS = 4
_STEP = 32 << 10  # elements whose differences are computed at a time, in the processor's cache
_BFLOAT16 = numpy_dtype("bfloat16")
_ALONE = 1 << 20
"""Bytes up to which all pairs together are not worth a second thread."""

Pair: TypeAlias = tuple[LazyTensor, LazyTensor]
"""Two tensors of one shape: one of A, one of B."""
Visit: TypeAlias = Callable[[int, NDArray[Any], NDArray[Any]], bool]
"""Given the number of a pair and a block of both sides, say whether to go on with the pair."""


class BlockReader:
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
class Deviation:
    """How far two tensors are apart."""

    differing: int = 0
    """Elements that are not the same."""
    beyond: int = 0
    """Elements that differ by more than the tolerance."""
    max_abs: float = 0.0
    """The largest absolute difference; infinite where one side alone is NaN or infinite."""
    max_rel: float = 0.0
    """The largest difference relative to A, where that is not zero; infinite if it always is."""

    def add(self, other: Deviation) -> None:
        """Add what another part of the tensors says."""
        self.differing += other.differing
        self.beyond += other.beyond
        self.max_abs = max(self.max_abs, other.max_abs)
        # Infinity stands for "A was zero", until a part says more.
        said = [one for one in (self.max_rel, other.max_rel) if math.isfinite(one)]
        self.max_rel = max(said) if any(said) else max(self.max_rel, other.max_rel)


def measure(
    stream: BlockReader,
    pairs: Sequence[Pair],
    tolerance: Tolerance,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Deviation]:
    """Return how far the tensors of each pair are apart.

    ``advance`` is told the bytes of A that were compared since it was last called, from any thread.
    """
    found = [Deviation() for _ in pairs]
    lock = threading.Lock()

    def visit(number: int, first: NDArray[Any], second: NDArray[Any]) -> bool:
        advance(first.nbytes)
        if first.dtype == second.dtype and _equal_bytes(first, second):
            return True
        for start in range(0, len(first), _STEP):
            part = slice(start, start + _STEP)
            apart = _distance(first[part], second[part], tolerance)
            with lock:
                found[number].add(apart)
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


def _distance(first: NDArray[Any], second: NDArray[Any], tolerance: Tolerance) -> Deviation:
    """Return how far the elements of two blocks are apart."""
    same_dtype = first.dtype == second.dtype
    changed = len(first) - int(np.count_nonzero(same_bits(first, second))) if same_dtype else 0
    if same_dtype and not changed:
        return Deviation()
    wide = _wide_dtype(first.dtype, second.dtype)
    a, b = _widened(first, wide), _widened(second, wide)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        distance = np.abs(a - b)
        largest = float(distance.max())
        if wide == np.float32 and not math.isfinite(largest):  # bfloat16 may be as large
            a, b = first.astype(np.float64), second.astype(np.float64)
            distance = np.abs(a - b)
            largest = float(distance.max())
        if not math.isfinite(largest):
            alike = (a == b) | (np.isnan(a) & np.isnan(b))
            distance = np.where(alike, 0.0, np.where(np.isnan(distance), math.inf, distance))
            largest = float(distance.max())
        size = np.abs(a)
        relative = distance / size
        relative[size == 0] = 0
        most = float(np.fmax.reduce(relative))
    differing = int(np.count_nonzero(distance))
    if tolerance.exact:
        # Bits count: 0.0 is not -0.0. Of different dtypes only values can be compared.
        differing = beyond = changed if same_dtype else differing
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            close = (distance <= tolerance.atol + tolerance.rtol * size) & np.isfinite(distance)
        beyond = len(a) - int(np.count_nonzero(close | (distance == 0)))  # inf and NaN, too
    return Deviation(differing, beyond, largest, most if most or not largest else math.inf)


def _wide_dtype(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that differences are computed in: exact for every value of both."""
    if "c" in (first.kind, second.kind):
        return np.dtype(np.complex128)
    # Of integers too, and ml_dtypes have a kind of their own.
    return np.dtype(np.float32 if first.itemsize == second.itemsize == 2 else np.float64)


def _widened(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if values.dtype == _BFLOAT16 and dtype == np.float32:
        # The upper half of a float32; several times faster than the cast.
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype)
