"""Output files: made in full size, written at any place, and made durable."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptx.storage.file_plan import Crc32, FilePlan
from ckptx.storage.open_files import OpenFiles, read_all, write_all
from ckptx.tensors.lazy import LazyTensor
from ckptx.writing.atomic import sync_directory
from ckptx.writing.leaves import LEAF, Output

_MAX_OPEN = 512


class OutputFiles:
    """Output files, opened on demand."""

    def __init__(self) -> None:
        self._open = OpenFiles(os.O_RDWR, _MAX_OPEN)
        self.close = self._open.close

    def write(self, path: Path, offset: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at byte ``offset`` and start its way to the disk."""
        with naming(path), self._open.descriptor(os.fspath(path)) as descriptor:
            write_all(descriptor, offset, data)
            _start_writeback(descriptor, offset, len(data))

    def read(self, path: Path, offset: int, data: memoryview) -> bool:
        """Fill ``data`` from byte ``offset`` on; return whether the file has that much."""
        with self._open.descriptor(os.fspath(path)) as descriptor:
            try:
                return read_all(descriptor, offset, data) == len(data)
            except OSError:  # a part of the disk that cannot be read may well be written
                return False

    def flush(self, path: Path) -> None:
        """Wait until what was written to a file so far is on disk."""
        with naming(path), self._open.descriptor(os.fspath(path)) as descriptor:
            os.fdatasync(descriptor)

    def sync(self, path: Path) -> None:
        """Wait until a file is on disk; nothing more is written to it."""
        with naming(path), self._open.descriptor(os.fspath(path)) as descriptor:
            os.fsync(descriptor)
        self._open.close(os.fspath(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the system say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(path)
        raise


def create(
    plan: FilePlan, directory: Path, progress: Callable[[int], None], continued: bool
) -> Output:
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
        with naming(path):
            if plan.size:
                _allocate(descriptor, plan.size)
            for region in plan.regions:
                if isinstance(region.content, bytes):
                    write_all(descriptor, region.offset, region.content)
                    progress(region.size)
    finally:
        os.close(descriptor)
    tensors = {
        number: [b""] * -(-region.size // LEAF)
        for number, region in enumerate(plan.regions)
        if isinstance(region.content, LazyTensor)
    }
    summed = {r.content.region for r in plan.regions if isinstance(r.content, Crc32)}
    checksums = {number: [(0, 0)] * len(tensors[number]) for number in summed}
    return Output(plan, path, sum(map(len, tensors.values())), tensors, checksums)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the file's bytes, so that a full disk shows before anything is copied."""
    if _fallocate is not None:
        while _fallocate(descriptor, 0, 0, size):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise OSError(code, os.strerror(code))
            break
        else:
            return
    os.ftruncate(descriptor, size)


def _system_call(name: str, *types: type) -> Callable[..., int] | None:
    """Return a function of the C library, None where it has no such."""
    try:
        function: Any = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = types
    return function  # type: ignore[no-any-return]


# Not posix_fallocate: where a file system cannot, glibc writes a byte into every block instead.
_fallocate = _system_call("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _system_call(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_SYNC_FILE_RANGE_WRITE = 2  # linux include/uapi/linux/fs.h


def _start_writeback(descriptor: int, offset: int, size: int) -> None:
    # Only a hint: the copy then overlaps with the disk, and the sync at the end finds little to do.
    if _sync_file_range is not None and size >= 1 << 20:
        _sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def sync_directories(directory: Path, outputs: Sequence[Output]) -> None:
    """Make the names of the files below ``directory`` durable."""
    folders = {directory}
    for output in outputs:
        parent = output.path.parent
        while parent not in folders:
            folders.add(parent)
            parent = parent.parent
    for folder in folders:
        sync_directory(folder)
