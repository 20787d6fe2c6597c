"""Compare lazy tensors of two checkpoints block by block.

Equal blocks cost one comparison of bytes; only elements that differ are ever converted to numbers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.blocks import BlockReader
from ckptx.tensors.dtypes import numpy_dtype
from ckptx.tensors.lazy import LazyTensor

_STEP = 32 << 10  # elements whose differences are computed at a time, in the processor's cache
_BFLOAT16 = numpy_dtype("bfloat16")

Pair: TypeAlias = tuple[LazyTensor, LazyTensor]
"""Two tensors of one shape: one of A, one of B."""


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
        finite = [one for one in (self.max_rel, other.max_rel) if math.isfinite(one)]
        self.max_rel = max(finite) if any(finite) else max(self.max_rel, other.max_rel)


def measure(
    reader: BlockReader,
    pairs: Sequence[Pair],
    tolerance: Tolerance,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Deviation]:
    """Return how far the tensors of each pair are apart.

    ``advance`` is called, from any thread, with the bytes of A that were compared.
    """
    found = [Deviation() for _ in pairs]
    lock = threading.Lock()

    def visit(number: int, _start: int, blocks: Sequence[NDArray[Any]]) -> bool:
        first, second = blocks
        advance(first.nbytes)
        if first.dtype == second.dtype and _equal_bytes(first, second):
            return True
        for start in range(0, len(first), _STEP):
            part = slice(start, start + _STEP)
            apart = _distance(first[part], second[part], tolerance)
            with lock:
                found[number].add(apart)
        return True

    reader.each(pairs, visit, (0, 1))
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
