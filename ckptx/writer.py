"""Execute a plan: the only code that moves tensor bytes.

Every output tensor is cut into leaves of 4 MiB of its row-major bytes. Leaves are sorted by where
their source begins, batched, and each batch is gathered, hashed and written by one thread:

    sources ──preadv──> staging ──hash──> pwrite ──> files ──sync──> disk

Source order matters: eight row-parallel ranks take eight stripes of the same bytes, and reading
them once is several times faster than following the output files. Leaf digests make the digest of a
tensor independent of threads and order.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from isal import isal_zlib

from ckptx.errors import ConversionError, PlanError
from ckptx.lazy import ITEMSIZE, Cast, LazyTensor, Stored
from ckptx.pieces import flat_boxes, pieces
from ckptx.plan import Crc32, FilePlan, Region, SavePlan
from ckptx.publish import sync_directory
from ckptx.reader import WINDOW, Files, Gather
from ckptx.replicas import check_replicas

LEAF = 4 << 20
"""Bytes of a tensor that one digest covers, and that one step writes."""
_BATCH = 32 << 20  # bytes of output, and of what is cast to it, that one thread holds at a time
_ALIGNMENT = 64  # of leaves in memory
_BASE_MEMORY = 192 << 20  # three Python processes with their libraries
_MAX_OPEN = 512

DIGESTS: dict[str, Callable[[memoryview | bytes], bytes]] = {
    "xxh3_128": lambda data: xxhash.xxh3_128(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
"""Digests of tensors, by the name of their option."""


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write: threads, the memory of the whole conversion in bytes, what to verify."""

    threads: int = 0
    """0 chooses: as many as there are processors and the memory allows, at most 4."""
    max_memory: int = 512 << 20
    digest: str = "xxh3_128"
    check_replicas: str = "sample"


@dataclass(slots=True)
class Written:
    """What was written: per file, the digest of each of its tensors by region number."""

    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    replicas: int = 0


@dataclass(slots=True)
class _Output:
    """One output file while it is written."""

    plan: FilePlan
    path: Path
    left: int  # leaves still to write
    leaves: dict[int, list[bytes]]  # region -> digest per leaf
    checksums: dict[int, list[tuple[int, int]]]  # region -> (crc, bytes) per leaf, where needed


@dataclass(frozen=True, slots=True)
class _Leaf:
    output: _Output
    region: int
    start: int  # elements
    stop: int
    size: int  # bytes
    source: tuple[int, int]  # file, byte: where its first element comes from
    held: int  # bytes that a thread holds for it: its own, and those that a cast reads

    @property
    def tensor(self) -> LazyTensor:
        content = self.output.plan.regions[self.region].content
        assert isinstance(content, LazyTensor)
        return content


def peak_memory(options: WriteOptions) -> int:
    """Return the most bytes that a conversion with these options holds, all processes together."""
    return _BASE_MEMORY + choose_threads(options) * (_BATCH + WINDOW)


def choose_threads(options: WriteOptions) -> int:
    """Return the number of threads that the options and the memory allow."""
    fitting = (options.max_memory - _BASE_MEMORY) // (_BATCH + WINDOW)
    if fitting < 1:
        least = _BASE_MEMORY + _BATCH + WINDOW
        raise PlanError(
            f"--max-memory {options.max_memory >> 20} MiB: at least {least >> 20} MiB are needed"
        )
    return min(options.threads or min(4, os.cpu_count() or 1), fitting)


def execute(
    plan: SavePlan,
    files: Sequence[str],
    directory: Path,
    options: WriteOptions,
    progress: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write every file of a plan below ``directory`` and sync it to disk.

    ``files`` are the source paths that the plan's tensors refer to; ``progress`` is told the bytes
    written since it was last called, from any thread.

    Raises:
        ConversionError: a source cannot be read or changed meanwhile, a replica differs, the target
            cannot be written. What was written so far stays; the caller removes it.
    """
    before = _states(files)
    sources = Files(files)
    try:
        written = Written(replicas=check_replicas(plan, sources, options.check_replicas))
        outputs = [_create(file, directory, progress) for file in plan.files]
        _Executor(sources, outputs, options, progress).run()
        for output in outputs:
            written.digests[output.plan.path] = _digests(output, options.digest)
        _sync_directories(directory, outputs)
    except OSError as error:
        raise _failed(error, directory) from error
    finally:
        sources.close()
    changed = [path for path, state in _states(files).items() if state != before[path]]
    if changed:
        raise ConversionError(f"{changed[0]}: changed while it was converted; run again")
    return written


class _Executor:
    """Runs the leaves of all outputs on a pool of threads."""

    def __init__(
        self,
        sources: Files,
        outputs: Sequence[_Output],
        options: WriteOptions,
        progress: Callable[[int], None],
    ) -> None:
        self.sources = sources
        self.outputs = outputs
        self.digest = DIGESTS[options.digest]
        self.threads = choose_threads(options)
        self.progress = progress
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._targets = _Targets()
        self._syncs: list[Future[None]] = []

    def run(self) -> None:
        leaves = [leaf for output in self.outputs for leaf in _leaves(output)]
        leaves.sort(key=lambda leaf: leaf.source)
        try:
            with ThreadPoolExecutor(self.threads) as pool, ThreadPoolExecutor(1) as syncer:
                self._syncer = syncer
                try:
                    for output in self.outputs:
                        if not output.left:
                            self._finish(output)
                    _wait([pool.submit(self._move, batch) for batch in _batches(leaves)])
                    _wait(self._syncs)
                finally:
                    self._stop.set()  # batches that are still queued end at once
        finally:
            # Not before the threads ended: a number that was closed may soon be another file.
            self._targets.close()

    def _move(self, batch: list[_Leaf]) -> None:
        if self._stop.is_set():
            return
        staging, gather = self._tools()
        position = 0
        held = []
        for leaf in batch:
            buffer = staging[position : position + leaf.size]
            gather.add_range(leaf.tensor, leaf.start, leaf.stop, buffer)
            held.append((leaf, buffer.data))
            position += -(-leaf.size // _ALIGNMENT) * _ALIGNMENT
        gather.run()
        for leaf, data in held:
            self._write(leaf, data)

    def _tools(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], Gather]:
        if not hasattr(self._local, "gather"):
            self._local.gather = Gather(self.sources)
            self._local.staging = np.empty(_BATCH, np.uint8)
        return self._local.staging, self._local.gather

    def _write(self, leaf: _Leaf, data: memoryview) -> None:
        output, region = leaf.output, leaf.output.plan.regions[leaf.region]
        start = leaf.start * ITEMSIZE[leaf.tensor.dtype]
        number = start // LEAF
        output.leaves[leaf.region][number] = self.digest(data)
        if leaf.region in output.checksums:
            output.checksums[leaf.region][number] = (isal_zlib.crc32(data), leaf.size)
        self._targets.write(output.path, region.offset + start, data)
        self.progress(leaf.size)
        with self._lock:
            output.left -= 1
            if not output.left:
                self._finish(output)

    def _finish(self, output: _Output) -> None:
        """Write the checksums of a file whose tensors are all there, and sync it meanwhile."""
        for region in output.plan.regions:
            if isinstance(region.content, Crc32):
                parts = output.checksums[region.content.region]
                value = _combined(isal_zlib.crc32(region.content.head), parts)
                self._targets.write(output.path, region.offset, value.to_bytes(4, "little"))
        self._syncs.append(self._syncer.submit(self._targets.sync, output.path))


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait for all futures; at the first exception cancel what has not begun, and raise it."""
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    for future in done:
        future.result()


class _Targets:
    """Output files, opened on demand; the descriptors are capped."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._users: dict[Path, int] = {}
        self._lock = threading.Lock()

    def write(self, path: Path, offset: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at byte ``offset`` and start its way to the disk."""
        descriptor = self._acquire(path)
        try:
            _write_all(descriptor, offset, data)
            _start_writeback(descriptor, offset, len(data))
        except OSError as error:
            error.filename = os.fspath(path)
            raise
        finally:
            self._release(path)

    def sync(self, path: Path) -> None:
        """Wait until a file is on disk."""
        descriptor = self._acquire(path)
        try:
            os.fsync(descriptor)
        except OSError as error:
            error.filename = os.fspath(path)
            raise
        finally:
            self._release(path)
            self._close(path)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _acquire(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                idle = [p for p in self._open if not self._users.get(p)]
                for other in idle[: max(0, len(self._open) - _MAX_OPEN + 1)]:
                    os.close(self._open.pop(other))
                self._open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._users[path] = self._users.get(path, 0) + 1
            return self._open[path]

    def _release(self, path: Path) -> None:
        with self._lock:
            self._users[path] -= 1

    def _close(self, path: Path) -> None:
        with self._lock:
            if not self._users.get(path) and path in self._open:
                os.close(self._open.pop(path))


def tensor_digest(name: str, leaves: Sequence[bytes]) -> str:
    """Return the digest of a tensor, in hexadecimal, from the digests of its 4 MiB leaves."""
    return f"{name}:{DIGESTS[name](b''.join(leaves)).hex()}"


def _create(plan: FilePlan, directory: Path, progress: Callable[[int], None]) -> _Output:
    """Create a file of its full size, with all its literal bytes."""
    path = directory / plan.path
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if plan.size:
            _allocate(descriptor, plan.size)
        for region in plan.regions:
            if isinstance(region.content, bytes):
                _write_all(descriptor, region.offset, region.content)
                progress(region.size)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(descriptor)
    tensors = {
        number: [b""] * _leaf_count(region)
        for number, region in enumerate(plan.regions)
        if isinstance(region.content, LazyTensor)
    }
    summed = {r.content.region for r in plan.regions if isinstance(r.content, Crc32)}
    checksums = {number: [(0, 0)] * len(tensors[number]) for number in summed}
    return _Output(plan, path, sum(map(len, tensors.values())), tensors, checksums)


def _leaf_count(region: Region) -> int:
    return -(-region.size // LEAF)


def _leaves(output: _Output) -> Iterator[_Leaf]:
    for number, region in enumerate(output.plan.regions):
        tensor = region.content
        if not isinstance(tensor, LazyTensor):
            continue
        itemsize = ITEMSIZE[tensor.dtype]
        for start in range(0, tensor.numel, LEAF // itemsize):
            stop = min(tensor.numel, start + LEAF // itemsize)
            size = (stop - start) * itemsize
            source, width = _source(tensor, start, stop)
            held = -(-size // _ALIGNMENT) * _ALIGNMENT + (stop - start) * width
            yield _Leaf(output, number, start, stop, size, source, held)


def _source(tensor: LazyTensor, start: int, stop: int) -> tuple[tuple[int, int], int]:
    """Return the file and byte from which the first stored element of a range comes.

    The second value is the bytes per element that casts read beside it, 0 without a cast.
    """
    for box, _ in flat_boxes(tensor.shape, start, stop):
        for piece in pieces(tensor, box):
            leaf, width = piece.leaf, 0
            while isinstance(leaf, Cast):
                width += ITEMSIZE[leaf.base.dtype]
                leaf = next(pieces(leaf.base)).leaf
            if isinstance(leaf, Stored):
                return (leaf.file, leaf.offset), width
    return (-1, 0), 0


def _batches(leaves: Sequence[_Leaf]) -> Iterator[list[_Leaf]]:
    batch: list[_Leaf] = []
    room = _BATCH
    for leaf in leaves:
        if batch and leaf.held > room:
            yield batch
            batch, room = [], _BATCH
        batch.append(leaf)
        room -= leaf.held
    if batch:
        yield batch


def _digests(output: _Output, name: str) -> dict[int, str]:
    return {number: tensor_digest(name, leaves) for number, leaves in output.leaves.items()}


def _combined(crc: int, parts: Sequence[tuple[int, int]]) -> int:
    for part, size in parts:
        crc = isal_zlib.crc32_combine(crc, part, size)
    return crc


def _write_all(descriptor: int, offset: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the file's bytes, so that a full disk shows before anything is copied."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _load_sync_file_range() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _load_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2  # linux include/uapi/linux/fs.h


def _start_writeback(descriptor: int, offset: int, size: int) -> None:
    # Only a hint: the copy then overlaps with the disk, and the sync at the end finds little to do.
    if _sync_file_range is not None and size >= 1 << 20:
        _sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def _sync_directories(directory: Path, outputs: Sequence[_Output]) -> None:
    folders = {directory}
    for output in outputs:
        parent = output.path.parent
        while parent not in folders:
            folders.add(parent)
            parent = parent.parent
    for folder in folders:
        sync_directory(folder)


def _states(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    states: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116 - /proc paths of the spool included
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
        states[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return states


def _failed(error: OSError, directory: Path) -> ConversionError:
    place = error.filename or directory
    advice = "; free space or choose another target" if error.errno == errno.ENOSPC else ""
    return ConversionError(f"{place}: cannot be written: {error.strerror}{advice}")
