"""Execute a plan: the only code that moves tensor bytes.

Every output tensor is cut into leaves of 4 MiB of its row-major bytes. Leaves are sorted by where
their source begins, batched, and each batch is gathered, hashed and written by one thread:

    sources ──preadv──> staging ──hash──> pwrite ──> files ──sync──> disk

Source order matters: eight row-parallel ranks take eight stripes of the same bytes, and reading
them once is several times faster than following the output files. Leaf digests make the digest of a
tensor independent of threads and order.

With a `ckptx.writing.journal.Journal` the leaves that are on disk are recorded as the work goes on,
and those that an earlier run has recorded are read back, compared with their digests, and not
written again.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from isal import isal_zlib

from ckptx.errors import ConversionError, CutShortError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import Crc32, FilePlan, Region
from ckptx.storage.gather import WINDOW, Gather
from ckptx.storage.open_files import Files, most_open
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import Cast, LazyTensor, Stored
from ckptx.tensors.pieces import flat_boxes, pieces
from ckptx.text.sizes import size_text
from ckptx.writing.atomic import keep_only, sync_directory
from ckptx.writing.disk import occupied_bytes, shortage
from ckptx.writing.journal import Journal
from ckptx.writing.replicas import check_replicas

_log = logging.getLogger(__name__)
LEAF = 4 << 20
"""Bytes of a tensor that one digest covers, and that one step writes."""
_BATCH = 32 << 20  # bytes of output, and of what is cast to it, that one thread holds at a time
_ALIGNMENT = 64  # of leaves in memory
_BASE_MEMORY = 192 << 20  # three Python processes with their libraries
_MAX_OPEN = 512
_FILES_PER_RECORD = 16  # from this many files on, the more is written between two records

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
    resumed: int = 0
    """Bytes that an earlier run had written."""
    infinite: Mapping[str, int] = field(default_factory=dict)
    """Tensor to the number of its infinite elements, of those that a cast may have made so."""


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
    number: int  # in the order of the plan
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

    @property
    def begin(self) -> int:
        """The byte of the region's data at which it begins."""
        return self.start * ITEMSIZE[self.tensor.dtype]

    @property
    def place(self) -> tuple[Path, int]:
        """The file, and the byte of it, at which it begins."""
        return self.output.path, self.output.plan.regions[self.region].offset + self.begin


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
    journal: Journal | None = None,
    before: Mapping[str, Sequence[int]] | None = None,
    inexact: Collection[str] = (),
) -> Written:
    """Write every file of a plan below ``directory`` and sync it to disk.

    ``files`` are the source paths that the plan's tensors refer to; ``progress`` is told the bytes
    written since it was last called, from any thread. ``before`` are the `states` of the files when
    the plan was made, by default those of now. ``inexact`` names the tensors whose infinite
    elements are counted, since a value may have become too large for its dtype.

    Raises:
        ConversionError: a source cannot be read or changed meanwhile, a replica differs. What was
            written so far stays; the caller removes it.
        CutShortError: the disk is full or fails; what the journal says is on it.
    """
    before = before or states(files)
    sources = Files(files)
    try:
        written = Written(replicas=check_replicas(plan, sources, options.check_replicas))
        with writing(directory, plan):
            continued = journal is not None and bool(journal.leaves)
            if continued:
                keep_only(directory, {file.path for file in plan.files})
            outputs = [_create(file, directory, progress, continued) for file in plan.files]
            executor = _Executor(sources, outputs, options, progress, directory, journal)
            executor.inexact = frozenset(inexact)
            executor.run()
            for output in outputs:
                written.digests[output.plan.path] = _digests(output, options.digest)
            _sync_directories(directory, outputs)
        written.resumed = executor.resumed
        written.infinite = dict(sorted(executor.infinite.items()))
    finally:
        sources.close()
    changed = [path for path, state in states(files).items() if state[:3] != before[path][:3]]
    if changed:
        raise ConversionError(f"{changed[0]}: changed while it was converted; run again")
    return written


@contextmanager
def writing(directory: Path, plan: SavePlan | None = None) -> Iterator[None]:
    """Turn what the system says about files of the target into an error that names them.

    Of a full disk it says how much is missing for the ``plan``.

    Raises:
        CutShortError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        place, advice = error.filename or directory, ""
        if error.errno == errno.ENOSPC:
            short = shortage(directory, plan, occupied_bytes(directory))
            advice = f"{short and ': '}{short}; free space or choose another target"
        raise CutShortError(f"{place}: cannot be written: {error.strerror}{advice}") from error


class _Executor:
    """Runs the leaves of all outputs on a pool of threads."""

    def __init__(
        self,
        sources: Files,
        outputs: Sequence[_Output],
        options: WriteOptions,
        progress: Callable[[int], None],
        directory: Path,
        journal: Journal | None,
    ) -> None:
        self.sources = sources
        self.outputs = outputs
        self.resumed = 0
        self.inexact: frozenset[str] = frozenset()
        self.infinite: Counter[str] = Counter()
        self.digest = DIGESTS[options.digest]
        self.threads = choose_threads(options)
        self.progress = progress
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._targets = _Targets()
        self._syncs: list[Future[None]] = []
        self._journal = journal
        self._recorder = _Recorder(journal, self._targets, directory, outputs) if journal else None

    def run(self) -> None:
        leaves = list(_leaves(self.outputs))
        try:
            with ThreadPoolExecutor(self.threads) as pool, ThreadPoolExecutor(1) as syncer:
                self._syncer = syncer
                try:
                    leaves = self._missing(leaves, pool)
                    leaves.sort(key=lambda leaf: leaf.source)
                    for output in self.outputs:
                        if not output.left:
                            self._finish(output)
                    _wait([pool.submit(self._move, batch) for batch in _batches(leaves)])
                    _wait(self._syncs)
                    if self._recorder:
                        self._recorder.close()
                finally:
                    self._stop.set()  # batches that are still queued end at once
        finally:
            # Not before the threads ended: a number that was closed may soon be another file.
            self._targets.close()

    def _missing(self, leaves: list[_Leaf], pool: ThreadPoolExecutor) -> list[_Leaf]:
        """Return the leaves that are not on disk as the journal says."""
        recorded = self._journal.leaves if self._journal else {}
        known = [leaf for leaf in leaves if leaf.number in recorded]
        if not known:
            return leaves
        whole: set[int] = set()
        known.sort(key=lambda leaf: leaf.place)
        _wait([pool.submit(self._look, batch, recorded, whole) for batch in _batches(known)])
        damaged = Counter(leaf.output.path for leaf in known if leaf.number not in whole)
        for path, count in damaged.items():
            _log.warning("%s: %d parts are damaged, and are written again", path, count)
        self.resumed = sum(leaf.size for leaf in known if leaf.number in whole)
        total = sum(output.plan.size for output in self.outputs)
        _log.warning(
            "resuming: %s of %s are there and whole", size_text(self.resumed), size_text(total)
        )
        if self._recorder:
            self._recorder.durable = self.resumed
        return [leaf for leaf in leaves if leaf.number not in whole]

    def _look(self, batch: list[_Leaf], recorded: Mapping[int, bytes], whole: set[int]) -> None:
        """Read leaves back; add those to ``whole`` that are as recorded."""
        staging, _ = self._tools()
        for leaf in batch:
            if self._stop.is_set():
                return
            data = staging[: leaf.size].data
            if not self._targets.read(*leaf.place, data):
                continue
            digest = self.digest(data)
            if digest == recorded[leaf.number]:
                self._account(leaf, data, digest)
                self.progress(leaf.size)
                with self._lock:
                    leaf.output.left -= 1
                    whole.add(leaf.number)

    def _account(self, leaf: _Leaf, data: memoryview, digest: bytes) -> None:
        """Keep the digest of a leaf, and its checksum where one is wanted."""
        output, number = leaf.output, leaf.begin // LEAF
        output.leaves[leaf.region][number] = digest
        if leaf.region in output.checksums:
            output.checksums[leaf.region][number] = (isal_zlib.crc32(data), leaf.size)
        name = output.plan.regions[leaf.region].name
        if name in self.inexact and (count := _infinite(leaf.tensor.dtype, data)):
            with self._lock:
                self.infinite[name] += count

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
        digest = self.digest(data)
        self._account(leaf, data, digest)
        self._targets.write(*leaf.place, data)
        self.progress(leaf.size)
        with self._lock:
            leaf.output.left -= 1
            if not leaf.output.left:
                self._finish(leaf.output)
            if self._recorder and self._recorder.add(leaf, digest):
                self._later(self._recorder.save, self._recorder.take())

    def _finish(self, output: _Output) -> None:
        """Write the checksums of a file whose tensors are all there, and sync it meanwhile."""
        for region in output.plan.regions:
            if isinstance(region.content, Crc32):
                parts = output.checksums[region.content.region]
                value = _combined(isal_zlib.crc32(region.content.head), parts)
                self._targets.write(output.path, region.offset, value.to_bytes(4, "little"))
        self._later(self._targets.sync, output.path)

    def _later(self, step: Callable[..., None], *arguments: object) -> None:
        """Have the syncer do something, after all it was given before."""

        def run() -> None:
            try:
                step(*arguments)
            except BaseException:
                self._stop.set()  # the error itself is met when all batches have ended
                raise

        self._syncs.append(self._syncer.submit(run))


class _Recorder:
    """Makes leaves durable now and then, and records them in the journal.

    It syncs the files that were written to since the last time. The more files these are, the more
    is written in between, so that the cost stays a small part of the writing. Files that are
    complete do not count: they are synced in any case, before the record is made.
    """

    def __init__(
        self, journal: Journal, targets: _Targets, directory: Path, outputs: Sequence[_Output]
    ) -> None:
        self.durable = 0
        self._journal = journal
        self._targets = targets
        self._directory = directory
        self._outputs = outputs
        self._fresh: dict[int, bytes] = {}
        self._size = 0
        self._unsynced: set[Path] = set()

    def add(self, leaf: _Leaf, digest: bytes) -> bool:
        """Note a leaf that was written; return whether it is time to save."""
        self._fresh[leaf.number] = digest
        self._size += leaf.size
        (self._unsynced.add if leaf.output.left else self._unsynced.discard)(leaf.output.path)
        every = self._journal.every
        return self._size >= max(every, len(self._unsynced) * every // _FILES_PER_RECORD)

    def take(self) -> tuple[dict[int, bytes], int, set[Path]]:
        """Return what is to be saved: leaves, their bytes, the files to sync first."""
        taken = self._fresh, self._size, self._unsynced
        self._fresh, self._size, self._unsynced = {}, 0, set()
        return taken

    def save(self, taken: tuple[dict[int, bytes], int, set[Path]]) -> None:
        """Wait until leaves are on disk, then record them."""
        leaves, size, unsynced = taken
        if not self._journal.records:
            # The names of the files must be as durable as what is in them.
            _sync_directories(self._directory, self._outputs)
            sync_directory(self._journal.path.parent)
            sync_directory(self._journal.path.parent.parent)
        for path in sorted(unsynced):
            self._targets.flush(path)
        self.durable += size
        self._journal.record(leaves, self.durable)

    def close(self) -> None:
        """Record the rest, all files having been synced; nothing if there is no record yet."""
        if self._fresh and (self._journal.records or self._journal.leaves):
            self.save(self.take())


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
        self._most = most_open(_MAX_OPEN)
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

    def read(self, path: Path, offset: int, data: memoryview) -> bool:
        """Fill ``data`` from byte ``offset`` on; return whether the file has that much."""
        descriptor = self._acquire(path)
        try:
            while data:
                count = os.preadv(descriptor, [data], offset)
                if not count:
                    return False
                data, offset = data[count:], offset + count
            return True
        except OSError:  # a part of the disk that cannot be read may well be written
            return False
        finally:
            self._release(path)

    def flush(self, path: Path) -> None:
        """Wait until what was written to a file so far is on disk."""
        descriptor = self._acquire(path)
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            error.filename = os.fspath(path)
            raise
        finally:
            self._release(path)

    def sync(self, path: Path) -> None:
        """Wait until a file is on disk; nothing more is written to it."""
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
                for other in idle[: max(0, len(self._open) - self._most + 1)]:
                    os.close(self._open.pop(other))
                self._open[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
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


def _create(
    plan: FilePlan, directory: Path, progress: Callable[[int], None], continued: bool
) -> _Output:
    """Create a file of its full size, with all its literal bytes; or go on with one of that size.

    A file that has a name elsewhere is made anew: it may be the only copy of something else.
    """
    path = directory / plan.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if continued and path.is_file():
        status = path.stat()
        if (status.st_size, status.st_nlink) != (plan.size, 1):
            path.unlink()
    exclusive = 0 if continued else os.O_EXCL
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | exclusive
    descriptor = os.open(path, flags, 0o666)
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


def _leaves(outputs: Iterable[_Output]) -> Iterator[_Leaf]:
    places = (
        (output, number, start)
        for output in outputs
        for number, region in enumerate(output.plan.regions)
        if isinstance(region.content, LazyTensor)
        for start in range(0, region.content.numel, LEAF // ITEMSIZE[region.content.dtype])
    )
    for number, (output, region, start) in enumerate(places):
        tensor = output.plan.regions[region].content
        assert isinstance(tensor, LazyTensor)
        itemsize = ITEMSIZE[tensor.dtype]
        stop = min(tensor.numel, start + LEAF // itemsize)
        size = (stop - start) * itemsize
        source, width = _source(tensor, start, stop)
        held = -(-size // _ALIGNMENT) * _ALIGNMENT + (stop - start) * width
        yield _Leaf(number, output, region, start, stop, size, source, held)


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


def _infinite(dtype: str, data: memoryview) -> int:
    """Return how many elements are infinite; 0 for dtypes that ends of casts seldom are."""
    code = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(dtype)
    if code is None:
        return 0
    return int(np.count_nonzero(np.frombuffer(data, np.uint16) & 0x7FFF == code))


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


def states(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return inode, size in bytes, and the times of change of data and inode, of each file.

    Raises:
        ConversionError: a file cannot be found.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116 - /proc paths of the spool included
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
        found[path] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found
