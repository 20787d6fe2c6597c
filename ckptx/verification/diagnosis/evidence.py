"""The two checkpoints as hypotheses see them: readers of tensors, samples, dimensions.

Samples are a few elements of a tensor: enough to dismiss a hypothesis, never enough to believe one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptx.model.canonical_names import VISION
from ckptx.model.spec import ModelSpec
from ckptx.storage.blocks import BlockReader
from ckptx.storage.gather import Gather
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE, is_widening
from ckptx.tensors.joins import deinterleave, interleave
from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.verification.pairing import Name, Paired

Found = TypeVar("Found")
Read: TypeAlias = Callable[[Name], LazyTensor | None]
"""Returns the tensor of a name, None if there is none."""
PARTS = ("query", "key", "value")
_RUN = 32  # elements that are read together
_RUNS = 6
_ROUNDED = ("float32", "float16", "bfloat16")  # dtypes that wider ones can be cast to


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor that differs: its shapes, and the dimensions of its model."""

    name: Name
    a: Shape
    b: Shape
    spec: ModelSpec | None
    """The dimensions of the part of the model that it is of, None where they are unknown."""
    evidence: Evidence


class Evidence:
    """Two checkpoints, and the names of the tensors that differ or that only one side has."""

    def __init__(self, paired: Paired, differing: Sequence[Name], reader: BlockReader) -> None:
        self.sides = (paired.left, paired.right)
        self.differing = tuple(differing)
        self.reader = reader
        self.sampler = Sampler(reader.files)
        self.reads: tuple[Read, Read] = (partial(self._read, 0), partial(self._read, 1))
        self._known: dict[object, Any] = {}

    def once(self, look: Callable[..., Found], *arguments: object) -> Found:
        """Return what ``look(self, *arguments)`` finds in the evidence; it looks once."""
        key = look, arguments
        if key not in self._known:
            self._known[key] = look(self, *arguments)
        found: Found = self._known[key]
        return found

    def pair(self, name: Name) -> TensorPair | None:
        """Return shapes and dimensions of a tensor, None if one side lacks it."""
        a, b = (read(name) for read in self.reads)
        if a is None or b is None:
            return None
        return TensorPair(name, a.shape, b.shape, self.spec(name), self)

    def spec(self, name: Name) -> ModelSpec | None:
        """Return the dimensions of the part of the model that a tensor is of, if known."""
        message = name[0]
        if not message:
            return None
        if not message.startswith(VISION):
            part = "language"
        else:
            part = "projection" if message.startswith("vision ") else "vision"
        return self.sides[0].parts.get(part) or self.sides[1].parts.get(part)

    def digests(self, name: Name) -> tuple[bytes | None, bytes | None]:
        """Return digests of samples of a tensor on both sides, in the narrower of their dtypes."""
        a, b = (side.tensors.get(name) for side in self.sides)
        if a is None or b is None or (dtype := common_dtype(a.dtype, b.dtype)) is None:
            return None, None
        return self.sampler.digest(0, a, dtype), self.sampler.digest(1, b, dtype)

    def _read(self, side: int, name: Name) -> LazyTensor | None:
        """Return a tensor of a side; query, key or value within a fused one, too."""
        message, key = name
        fused, _, part = key.partition("/")
        tensors, spec = self.sides[side].tensors, self.spec(name)
        if part not in PARTS or spec is None:
            return tensors.get(name)
        tensor = tensors.get((message, fused))
        return None if tensor is None else parts_of(tensor, spec)[PARTS.index(part)]


class Sampler:
    """Reads samples of the tensors of two checkpoints from their open files."""

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
    for narrow, wide in ((first, second), (second, first)):
        if narrow in _ROUNDED and is_widening(narrow, wide):
            return narrow
    return None


def part_names(name: Name) -> list[Name]:
    """Return names for query, key and value within a fused tensor."""
    message, key = name
    return [(message, f"{key}/{part}") for part in PARTS]


def rows_of(spec: ModelSpec) -> list[int]:
    """Return the rows of query, key and value."""
    key = spec.num_query_groups * spec.kv_channels
    return [spec.num_attention_heads * spec.kv_channels, key, key]


def parts_of(fused: LazyTensor, spec: ModelSpec) -> list[LazyTensor]:
    """Return query, key and value of a fused tensor in canonical order."""
    return deinterleave(fused, rows_of(spec), spec.num_query_groups)


def fused_of(parts: Sequence[LazyTensor], spec: ModelSpec) -> LazyTensor:
    """Return query, key and value as one tensor in canonical order."""
    return interleave(parts, spec.num_query_groups)
