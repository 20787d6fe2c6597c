"""Compare the copies that a source holds of one tensor.

Norms lie in every tensor-parallel rank, tied embeddings in two pipeline stages. One copy is read;
that the others equal it is checked here, before anything is copied, because ranks of different runs
mixed in one directory are a common accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptx.errors import ConversionError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.blocks import BlockReader, Range
from ckptx.storage.open_files import Files
from ckptx.tensors import lazy
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor, Replicated, stored

MODES = ("sample", "all", "none")
"""Compare up to 1 MiB of each tensor, every byte, or nothing."""
_BLOCK = 64 << 10
_SAMPLES = 16  # blocks of a tensor above 1 MiB: the first, the last, and spread ones between


def check_replicas(plan: SavePlan, files: Files, mode: str = "sample") -> int:
    """Return how many copies were compared.

    Raises:
        ConversionError: two copies of one tensor differ.
    """
    if mode not in MODES:
        raise PlanError(f"unknown replica check {mode!r}; known: {', '.join(MODES)}")
    if mode == "none":
        return 0
    found: dict[Replicated, str] = {}
    for file in plan.files:
        for region in file.regions:
            if isinstance(region.content, LazyTensor):
                for node in _replicated(region.content):
                    found.setdefault(node, region.name)
    nodes = list(found)

    def compare(number: int, start: int, copies: Sequence[NDArray[Any]]) -> bool:
        first, *others = [copy.view(np.uint8) for copy in copies]
        for place, other in enumerate(others, 1):
            if not np.array_equal(first, other):
                element = start + int(np.flatnonzero(first != other)[0]) // copies[0].itemsize
                name = found[nodes[number]]
                # Of tied embeddings the last pipeline stage has a copy as its output layer.
                untied = ", or args call an output layer tied that is not" * ("emb" in name)
                raise ConversionError(
                    f"{name!r}: copy {place} of {len(copies)} differs from copy 0 at element "
                    f"{element}; the rank files are not of one checkpoint{untied}. Find the "
                    "right files, or pass --check-replicas none to take copy 0"
                )
        return True

    ranges = _samples if mode == "sample" else None
    reader = BlockReader(files, threads=1, block=_BLOCK)  # so that the first difference is told
    reader.each([node.copies for node in nodes], compare, ranges=ranges)
    return sum(len(node.copies) - 1 for node in nodes)


def holds_samples(plan: SavePlan, files: Sequence[str], place: Path) -> bool:
    """Return whether the files below ``place`` hold what a plan writes, by samples of each tensor.

    ``files`` are those that the plan reads.
    """
    pairs = [
        (region.content, stored(number, region.offset, region.content.dtype, region.content.shape))
        for number, file in enumerate(plan.files)
        for region in file.regions
        if isinstance(region.content, LazyTensor)
    ]
    same = True

    def compare(_number: int, _start: int, arrays: Sequence[NDArray[Any]]) -> bool:
        nonlocal same
        same = same and arrays[0].tobytes() == arrays[1].tobytes()
        return same

    written = [str(place / file.path) for file in plan.files]
    with closing(Files(files)) as sources, closing(Files(written)) as targets:
        reader = BlockReader(sources, targets, threads=1, block=_BLOCK)
        reader.each(pairs, compare, sides=(0, 1), ranges=_samples)
    return same


def _replicated(tensor: LazyTensor) -> Iterator[Replicated]:
    match tensor:
        case Replicated(copies=copies):
            yield tensor
            for copy in copies:
                yield from _replicated(copy)
        case lazy.Tiled(tiles=tiles):
            for _, part in tiles:
                yield from _replicated(part)
        case lazy.Cast() | lazy.Sliced() | lazy.Permuted() | lazy.Split() | lazy.Merged():
            yield from _replicated(tensor.base)
        case lazy.Computed(inputs=inputs):
            for source in inputs:
                yield from _replicated(source)


def _samples(tensor: LazyTensor) -> Iterator[Range]:
    """Yield the elements of a tensor to compare."""
    block = _BLOCK // ITEMSIZE[tensor.dtype]
    if tensor.nbytes <= _SAMPLES * _BLOCK:
        yield 0, tensor.numel
        return
    seed = hashlib.sha256(repr((tensor.dtype, tensor.shape)).encode()).digest()
    spread = np.random.default_rng(list(seed)).integers(0, tensor.numel - block, _SAMPLES - 2)
    for at in sorted({0, tensor.numel - block, *map(int, spread)}):
        yield at, at + block
