"""Read lazy tensors side by side, block by block, on a few threads, in constant memory.

Tensors that belong together (a pair to compare, the copies of one weight, one tensor to measure)
are a group. The same elements of all tensors of a group are read into buffers that are used again,
and handed to a visitor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor

if TYPE_CHECKING:  # a loader may compare nothing, and then needs no numpy
    from numpy.typing import NDArray

BLOCK = 4 << 20
_THREADS = 4  # more do not help: the disk or the memory is the limit
_ALONE = 1 << 20
"""Bytes up to which all groups together are not worth a second thread."""

Range: TypeAlias = tuple[int, int]
"""Elements from the first number to the second, in row-major order."""
Group: TypeAlias = Sequence[LazyTensor]
"""Tensors of one shape."""
Visit: TypeAlias = "Callable[[int, int, Sequence[NDArray[Any]]], bool]"
"""Given the number of a group, the first element of a block, and the block of each tensor, say
whether to go on with the group. The arrays are valid until it returns."""


class BlockReader:
    """Reads blocks of at most ``block`` bytes of tensors of one checkpoint or of several.

    ``files`` are the open files of each checkpoint.
    """

    def __init__(self, *files: Files, threads: int = 0, block: int = BLOCK) -> None:
        self.files = files
        self.threads = threads or min(_THREADS, os.cpu_count() or 1)
        self.block = block
        self._local = threading.local()

    def each(
        self,
        groups: Sequence[Group],
        visit: Visit,
        sides: Sequence[int] = (),
        ranges: Callable[[LazyTensor], Iterable[Range]] | None = None,
    ) -> None:
        """Call ``visit`` with every block, from any thread, until it says False for the group.

        ``sides`` are the checkpoints that the tensors of each group are of, by default the first.
        ``ranges`` chooses what to read, by the first tensor of a group; by default all.
        """
        stopped = [False] * len(groups)
        blocks = self._blocks(groups, ranges)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                number, start, stop = block
                if not stopped[number]:
                    group = groups[number]
                    arrays = self._read(group, sides or [0] * len(group), start, stop)
                    stopped[number] = not visit(number, start, arrays)

        if self.threads == 1 or sum(group[0].nbytes for group in groups) <= _ALONE:
            work()  # faster than to wake a thread
            return
        with ThreadPoolExecutor(self.threads) as pool:
            for future in [pool.submit(work) for _ in range(self.threads)]:
                future.result()

    def _blocks(
        self, groups: Sequence[Group], ranges: Callable[[LazyTensor], Iterable[Range]] | None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield the number of a group and a range of elements, in order."""
        for number, group in enumerate(groups):
            step = self.block // max(ITEMSIZE[tensor.dtype] for tensor in group)
            for first, last in ranges(group[0]) if ranges else [(0, group[0].numel)]:
                for start in range(first, last, step):
                    yield number, start, min(last, start + step)

    def _read(
        self, group: Group, sides: Sequence[int], start: int, stop: int
    ) -> list[NDArray[Any]]:
        import numpy as np

        from ckptx.storage.gather import Gather

        local = self._local
        if not hasattr(local, "buffers"):
            local.gathers, local.buffers = [Gather(files) for files in self.files], []
        while len(local.buffers) < len(group):
            local.buffers.append(np.empty(self.block, np.uint8))
        arrays = [
            local.gathers[side].add_range(tensor, start, stop, buffer)
            for side, tensor, buffer in zip(sides, group, local.buffers, strict=False)
        ]
        for side in set(sides):
            local.gathers[side].run()
        return arrays


def equal(
    first: LazyTensor,
    second: LazyTensor,
    files: Sequence[str],
    ranges: Callable[[LazyTensor], Iterable[Range]] | None = None,
) -> bool:
    """Return whether two tensors have the same bytes; reads both unless they are one extent.

    ``ranges`` chooses what is compared, by default all.
    """
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    same = True

    def visit(_number: int, _start: int, arrays: Sequence[NDArray[Any]]) -> bool:
        nonlocal same
        same = same and arrays[0].tobytes() == arrays[1].tobytes()
        return same

    if first != second:
        with closing(Files(files)) as source:
            BlockReader(source, threads=1).each([(first, second)], visit, ranges=ranges)
    return same
