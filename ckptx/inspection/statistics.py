"""Statistics of tensors, streamed: one pass over their bytes, a few blocks in memory.

Blocks are merged as Chan, Golub and LeVeque do ("Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", 1979): counts, means and squared distances from the mean add up, so
neither the order of blocks nor their number loses digits. Everything is computed in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.blocks import BlockReader
from ckptx.storage.open_files import Files
from ckptx.tensors.lazy import LazyTensor

_BLOCK = 2 << 20  # bytes; of bfloat16 8 MiB of float64


@dataclass(slots=True)
class Statistics:
    """What the elements of a tensor are like.

    ``minimum``, ``maximum``, ``mean`` and ``std`` are of the finite elements; None where there are
    none, and for complex tensors.
    """

    elements: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    _finite: int = 0
    _squares: float = 0.0
    """Sum of the squared distances from the mean."""

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample, with n - 1, as ``torch.std`` has it."""
        if self.mean is None:
            return None
        return math.sqrt(self._squares / (self._finite - 1)) if self._finite > 1 else math.nan

    def add(self, other: Statistics) -> None:
        """Add the statistics of further elements."""
        self.elements += other.elements
        self.nan += other.nan
        self.inf += other.inf
        self.zeros += other.zeros
        if other.mean is None or other.minimum is None or other.maximum is None:
            return
        if self.mean is None or self.minimum is None or self.maximum is None:
            self.minimum, self.maximum, self.mean = other.minimum, other.maximum, other.mean
            self._finite, self._squares = other._finite, other._squares
            return
        count = self._finite + other._finite
        apart = other.mean - self.mean
        self._squares += other._squares + apart * apart * self._finite * (other._finite / count)
        self.mean += apart * (other._finite / count)
        self._finite = count
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is not finite is None."""
        std = self.std
        return {
            "min": self.minimum,
            "max": self.maximum,
            "mean": self.mean,
            "std": None if std is None or math.isnan(std) else std,
            "nan": self.nan,
            "inf": self.inf,
            "zeros": self.zeros,
        }


def statistics_of(
    tensors: Mapping[str, LazyTensor],
    files: Sequence[str],
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Statistics]:
    """Return the statistics of tensors by name; ``advance`` is called with the bytes done.

    Raises:
        ConversionError: a file cannot be read.
    """
    sums = [Statistics() for _ in tensors]
    blocks: list[dict[int, Statistics]] = [{} for _ in tensors]  # by their first elements
    groups = [(tensor,) for tensor in tensors.values()]
    lock = threading.Lock()

    def visit(number: int, start: int, arrays: Sequence[NDArray[Any]]) -> bool:
        values = arrays[0]
        block = measured(values)
        with lock:
            blocks[number][start] = block
            if sum(done.elements for done in blocks[number].values()) == groups[number][0].numel:
                for _, done in sorted(blocks[number].items()):
                    sums[number].add(done)  # in order: their number does not depend on threads
                blocks[number].clear()
        advance(values.nbytes)
        return True

    with closing(Files(files)) as source:
        BlockReader(source, block=_BLOCK).each(groups, visit)
    return dict(zip(tensors, sums, strict=True))


def measured(values: NDArray[Any]) -> Statistics:
    """Return the statistics of an array."""
    found = Statistics(elements=values.size, zeros=values.size - int(np.count_nonzero(values)))
    if np.iscomplexobj(values):
        found.nan = int(np.isnan(values).sum())
        found.inf = int(np.isinf(values).sum())
        return found
    # A NaN may be a signalling one, and inf - inf is NaN: one look at the sum tells whether every
    # element is finite.
    with np.errstate(invalid="ignore", over="ignore"):
        wide = values.astype(np.float64)
        total = float(wide.sum())
    if not math.isfinite(total):
        finite = np.isfinite(wide)
        found.nan = int(np.isnan(wide).sum())
        found.inf = wide.size - int(finite.sum()) - found.nan
        wide = wide[finite]
        with np.errstate(over="ignore"):
            total = float(wide.sum())
    if not wide.size:
        return found
    found._finite = wide.size
    found.minimum, found.maximum = float(wide.min()), float(wide.max())
    found.mean = total / wide.size
    wide -= found.mean
    with np.errstate(over="ignore"):
        found._squares = float(np.dot(wide, wide))
    return found
