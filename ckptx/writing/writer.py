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

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal import isal_zlib

from ckptx.errors import ConversionError, CutShortError, PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import Crc32
from ckptx.storage.gather import WINDOW, Gather
from ckptx.storage.open_files import Files
from ckptx.text.sizes import size_text
from ckptx.writing.atomic import keep_only, sync_directory
from ckptx.writing.disk import occupied_bytes, shortage
from ckptx.writing.journal import Journal
from ckptx.writing.leaves import (
    ALIGNMENT,
    BATCH,
    DIGESTS,
    LEAF,
    Leaf,
    Output,
    batches,
    leaves_of,
    tensor_digest,
)
from ckptx.writing.output_files import OutputFiles, create, sync_directories
from ckptx.writing.replicas import check_replicas

_log = logging.getLogger(__name__)
_BASE_MEMORY = 192 << 20  # three Python processes with their libraries
_FILES_PER_RECORD = 16  # from this many files on, the more is written between two records


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


def peak_memory(options: WriteOptions) -> int:
    """Return the most bytes that a conversion with these options holds, all processes together."""
    return _BASE_MEMORY + choose_threads(options) * (BATCH + WINDOW)


def choose_threads(options: WriteOptions) -> int:
    """Return the number of threads that the options and the memory allow."""
    fitting = (options.max_memory - _BASE_MEMORY) // (BATCH + WINDOW)
    if fitting < 1:
        least = _BASE_MEMORY + BATCH + WINDOW
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
    with closing(Files(files)) as sources:
        written = Written(replicas=check_replicas(plan, sources, options.check_replicas))
        with writing(directory, plan):
            continued = journal is not None and bool(journal.leaves)
            if continued:
                keep_only(directory, {file.path for file in plan.files})
            outputs = [create(file, directory, progress, continued) for file in plan.files]
            executor = _Executor(sources, outputs, options, progress, directory, journal)
            executor.inexact = frozenset(inexact)
            executor.run()
            for output in outputs:
                written.digests[output.plan.path] = {
                    number: tensor_digest(options.digest, leaves)
                    for number, leaves in output.leaves.items()
                }
            sync_directories(directory, outputs)
        written.resumed = executor.resumed
        written.infinite = dict(sorted(executor.infinite.items()))
    changed = [path for path, state in states(files).items() if state != before[path]]
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
        outputs: Sequence[Output],
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
        self._targets = OutputFiles()
        self._syncs: list[Future[None]] = []
        self._journal = journal
        self._recorder = _Recorder(journal, self._targets, directory, outputs) if journal else None

    def run(self) -> None:
        leaves = list(leaves_of(self.outputs))
        try:
            with ThreadPoolExecutor(self.threads) as pool, ThreadPoolExecutor(1) as syncer:
                self._syncer = syncer
                try:
                    leaves = self._missing(leaves, pool)
                    leaves.sort(key=lambda leaf: leaf.source)
                    for output in self.outputs:
                        if not output.left:
                            self._finish(output)
                    _wait([pool.submit(self._move, batch) for batch in batches(leaves)])
                    _wait(self._syncs)
                    if self._recorder:
                        self._recorder.close()
                finally:
                    self._stop.set()  # batches that are still queued end at once
        finally:
            # Not before the threads ended: a number that was closed may soon be another file.
            self._targets.close()

    def _missing(self, leaves: list[Leaf], pool: ThreadPoolExecutor) -> list[Leaf]:
        """Return the leaves that are not on disk as the journal says."""
        recorded = self._journal.leaves if self._journal else {}
        known = [leaf for leaf in leaves if leaf.number in recorded]
        if not known:
            return leaves
        whole: set[int] = set()
        known.sort(key=lambda leaf: leaf.place)
        _wait([pool.submit(self._look, batch, recorded, whole) for batch in batches(known)])
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

    def _look(self, batch: list[Leaf], recorded: Mapping[int, bytes], whole: set[int]) -> None:
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

    def _account(self, leaf: Leaf, data: memoryview, digest: bytes) -> None:
        """Keep the digest of a leaf, and its checksum where one is wanted."""
        output, number = leaf.output, leaf.begin // LEAF
        output.leaves[leaf.region][number] = digest
        if leaf.region in output.checksums:
            output.checksums[leaf.region][number] = (isal_zlib.crc32(data), leaf.size)
        name = output.plan.regions[leaf.region].name
        if name in self.inexact and (count := _infinite(leaf.tensor.dtype, data)):
            with self._lock:
                self.infinite[name] += count

    def _move(self, batch: list[Leaf]) -> None:
        if self._stop.is_set():
            return
        staging, gather = self._tools()
        position = 0
        held = []
        for leaf in batch:
            buffer = staging[position : position + leaf.size]
            gather.add_range(leaf.tensor, leaf.start, leaf.stop, buffer)
            held.append((leaf, buffer.data))
            position += -(-leaf.size // ALIGNMENT) * ALIGNMENT
        gather.run()
        for leaf, data in held:
            self._write(leaf, data)

    def _tools(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], Gather]:
        if not hasattr(self._local, "gather"):
            self._local.gather = Gather(self.sources)
            self._local.staging = np.empty(BATCH, np.uint8)
        return self._local.staging, self._local.gather

    def _write(self, leaf: Leaf, data: memoryview) -> None:
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

    def _finish(self, output: Output) -> None:
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
        self, journal: Journal, targets: OutputFiles, directory: Path, outputs: Sequence[Output]
    ) -> None:
        self.durable = 0
        self._journal = journal
        self._targets = targets
        self._directory = directory
        self._outputs = outputs
        self._fresh: dict[int, bytes] = {}
        self._size = 0
        self._unsynced: set[Path] = set()

    def add(self, leaf: Leaf, digest: bytes) -> bool:
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
            sync_directories(self._directory, self._outputs)
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


def _infinite(dtype: str, data: memoryview) -> int:
    """Return how many elements are infinite; 0 for dtypes that ends of casts seldom are."""
    if (code := {"float16": 0x7C00, "bfloat16": 0x7F80}.get(dtype)) is None:
        return 0
    return int(np.count_nonzero(np.frombuffer(data, np.uint16) & 0x7FFF == code))


def _combined(crc: int, parts: Sequence[tuple[int, int]]) -> int:
    for part, size in parts:
        crc = isal_zlib.crc32_combine(crc, part, size)
    return crc


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
