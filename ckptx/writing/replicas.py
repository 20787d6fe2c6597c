"""Compare the copies that a source holds of one tensor.

Norms lie in every tensor-parallel rank, tied embeddings in two pipeline stages. One copy is read;
that the others equal it is checked here, before anything is copied, because ranks of different runs
mixed in one directory are a common accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from ckptx.errors import ConversionError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.gather import Gather
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import (
    Cast,
    Computed,
    LazyTensor,
    Merged,
    Permuted,
    Replicated,
    Sliced,
    Split,
    Tiled,
)

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
    gather = Gather(files)
    for node, name in found.items():
        for start, stop in _ranges(node, mode):
            _compare(node, name, start, stop, gather)
    return sum(len(node.copies) - 1 for node in found)


def _replicated(tensor: LazyTensor) -> Iterator[Replicated]:
    match tensor:
        case Replicated(copies=copies):
            yield tensor
            for copy in copies:
                yield from _replicated(copy)
        case Tiled(tiles=tiles):
            for _, part in tiles:
                yield from _replicated(part)
        case Cast() | Sliced() | Permuted() | Split() | Merged():
            yield from _replicated(tensor.base)
        case Computed(inputs=inputs):
            for source in inputs:
                yield from _replicated(source)


def _ranges(node: Replicated, mode: str) -> Iterator[tuple[int, int]]:
    """Yield the element ranges of a tensor to compare."""
    block = _BLOCK // ITEMSIZE[node.dtype]
    if mode == "all" or node.nbytes <= _SAMPLES * _BLOCK:
        yield from ((at, min(at + block, node.numel)) for at in range(0, node.numel, block))
        return
    seed = hashlib.sha256(repr((node.dtype, node.shape)).encode()).digest()
    spread = np.random.default_rng(list(seed)).integers(0, node.numel - block, _SAMPLES - 2)
    for at in sorted({0, node.numel - block, *(int(value) for value in spread)}):
        yield at, at + block


def _compare(node: Replicated, name: str, start: int, stop: int, gather: Gather) -> None:
    size = (stop - start) * ITEMSIZE[node.dtype]
    buffers = [np.empty(size, np.uint8) for _ in node.copies]
    for copy, buffer in zip(node.copies, buffers, strict=True):
        gather.add_range(copy, start, stop, buffer)
    gather.run()
    for number, buffer in enumerate(buffers[1:], 1):
        if not np.array_equal(buffers[0], buffer):
            first = int(np.flatnonzero(buffers[0] != buffer)[0]) // ITEMSIZE[node.dtype]
            raise ConversionError(
                f"{name!r}: copy {number} of {len(node.copies)} differs from copy 0 at element "
                f"{start + first}; the rank files are not of one checkpoint. Find the right files, "
                "or pass --check-replicas none to take copy 0"
            )
