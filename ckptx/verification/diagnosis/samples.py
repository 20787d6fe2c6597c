"""A few elements of a tensor: enough to dismiss a hypothesis, never enough to believe one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptx.storage.gather import Gather
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE, is_widening
from ckptx.tensors.lazy import LazyTensor

_RUN = 32  # elements that are read together
_RUNS = 6
_ROUNDED = ("float32", "float16", "bfloat16")  # dtypes that wider ones can be cast to


class Sampler:
    """Reads samples of the tensors of two checkpoints, whose open files these are."""

    def __init__(self, files: Sequence[Files]) -> None:
        self._gathers = [Gather(one) for one in files]

    def runs(self, side: int, tensor: LazyTensor) -> list[NDArray[Any]]:
        """Return runs of elements: those at both ends, and some between, the same for a shape."""
        return [self.run(side, tensor, start) for start in starts(tensor.numel)]

    def run(self, side: int, tensor: LazyTensor, start: int) -> NDArray[Any]:
        """Return the run of elements that starts at ``start`` in row-major order."""
        stop = min(tensor.numel, start + _RUN)
        values = self._gathers[side].add_range(tensor, start, stop)
        self._gathers[side].run()
        return values

    def heads(self, side: int, tensors: Sequence[LazyTensor], dtype: str) -> list[bytes | None]:
        """Return the first elements of several tensors; None of one that starts with one value."""
        gather = self._gathers[side]
        heads = [
            gather.add_range(tensor.cast(dtype), 0, min(_RUN, tensor.numel)) for tensor in tensors
        ]
        gather.run()
        elements = [head.view(np.uint8).reshape(-1, ITEMSIZE[dtype]) for head in heads]
        return [None if (rows == rows[:1]).all() else rows.tobytes() for rows in elements]

    def digest(self, side: int, tensor: LazyTensor, dtype: str) -> bytes | None:
        """Return a digest of runs of a tensor in a dtype; None if they hold one value only."""
        runs = self.runs(side, tensor.cast(dtype))
        if not runs or all((run == runs[0][0]).all() for run in runs):
            return None
        return hashlib.blake2b(b"".join(run.tobytes() for run in runs), digest_size=16).digest()


@lru_cache(maxsize=1024)
def starts(numel: int) -> list[int]:
    """Return where the runs of a tensor of so many elements start."""
    if not numel:
        return []
    last = max(0, numel - _RUN)
    spread = np.random.default_rng(numel).integers(0, last + 1, _RUNS - 2)
    return list(dict.fromkeys([int(spread[0]), 0, last, *map(int, spread[1:])]))


def common_dtype(first: str, second: str) -> str | None:
    """Return the narrower of two dtypes, in which rounded copies are equal; None without one.

    Examples:
        >>> common_dtype("float32", "bfloat16"), common_dtype("float16", "bfloat16")
        ('bfloat16', None)
    """
    if first == second:
        return first
    narrow = first if is_widening(first, second) else second
    wide = second if narrow == first else first
    return narrow if narrow in _ROUNDED and is_widening(narrow, wide) else None
