"""A spool: one nameless file for tensors that exist in memory only.

Messages hold references to files, never tensors. A loader of a format that has no bytes to refer
to (compressed, computed, or read by foreign code) puts its tensors into the spool and refers to
those. The parent process creates it on the file system of the target, never in ``/tmp``; it
vanishes with the parent. Its size counts as disk, not as memory.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptx.errors import ConversionError, PluginError
from ckptx.storage.open_files import write_all
from ckptx.tensors.lazy import Stored, stored

_ALIGNMENT = 64  # a cache line; keeps any dtype aligned


class Spool:
    """Appends tensors to the spool file at ``path``, which a loader lists in `Begin.files`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._descriptor = -1
        self._end = 0

    @property
    def path(self) -> str:
        """Where the spool lies."""
        return self._path

    def put(self, data: Any, dtype: str, shape: Sequence[int], file: int = 0) -> Stored:
        """Append the bytes of ``data``, row-major, and return where they lie.

        ``data`` is a numpy array or any contiguous buffer; ``file`` is the place of `path` in the
        `Begin.files` of the loader.

        Raises:
            PluginError: the bytes are not those of ``shape`` and ``dtype``.
            ConversionError: the disk is full.
        """
        raw = data.reshape(-1).view("uint8") if hasattr(data, "reshape") else data
        view = memoryview(raw).cast("B")
        with self._lock:
            extent = stored(file, self._next(), dtype, shape)
            if len(view) != extent.nbytes:
                raise PluginError(
                    f"spool: {dtype} {list(shape)} takes {extent.nbytes} bytes, got {len(view)}"
                )
            self._write(view, extent.offset)
            self._end = extent.offset + len(view)
        return extent

    def append(self, blocks: Iterable[bytes]) -> tuple[int, int]:
        """Append what is decoded block by block; return where it begins and its size in bytes.

        Raises:
            ConversionError: the disk is full.
        """
        with self._lock:
            start = end = self._next()
            for block in blocks:
                self._write(memoryview(block), end)
                end += len(block)
            self._end = end
        return start, end - start

    def _next(self) -> int:
        """Return where the next extent begins; the file is open then."""
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        return -(-self._end // _ALIGNMENT) * _ALIGNMENT

    def close(self) -> None:
        """Close this process's view of the spool; what was put stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            write_all(self._descriptor, offset, view)
        except OSError as error:
            raise ConversionError(
                f"the spool next to the target cannot be written: {error.strerror}; free space or "
                "choose another target"
            ) from error


class TemporarySpool(Spool):
    """A spool of its own, made when it is first needed: in ``folder``, or for temporary files."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("")
        self._folder = folder
        self._file: SpoolFile | None = None

    @property
    def path(self) -> str:
        """Where the spool lies; it is made if it was not."""
        with self._making:
            if self._file is None:
                self._file = SpoolFile(self._folder or Path(tempfile.gettempdir()))
            return self._file.path

    def close(self) -> None:
        """Remove the spool."""
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None


class SpoolFile:
    """Owns the spool: creates it near ``target``, and lets it vanish at the end."""

    def __init__(self, target: Path) -> None:
        folder = target
        while not folder.is_dir():
            folder = folder.parent
        try:
            self._descriptor = _nameless(folder)
        except OSError as error:
            raise ConversionError(f"{folder}: cannot be written: {error.strerror}") from error

    @property
    def path(self) -> str:
        """Where other processes find the spool while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def nbytes(self) -> int:
        """The bytes in the spool so far."""
        return os.fstat(self._descriptor).st_size

    def __enter__(self) -> SpoolFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the spool vanish."""
        os.close(self._descriptor)


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (AttributeError, OSError):  # not Linux, or a file system without it (some NFS, FUSE)
        descriptor, name = tempfile.mkstemp(prefix=".ckptx-spool-", dir=folder)
        Path(name).unlink()
        return descriptor
