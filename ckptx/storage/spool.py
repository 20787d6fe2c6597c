"""A spool: one nameless file for tensors that exist in memory only.

Messages hold references to files, never tensors. A loader of a format that has no bytes to refer
to (computed, or read by foreign code) puts its tensors into the spool and refers to those. For
compressed ones it only reserves room: each is decoded when it is first read.

The parent process of a conversion creates the spool on the file system of the target, never in
``/tmp``; it vanishes with the parent. Its size counts as disk, not as memory.
"""

from __future__ import annotations

import os
import tempfile
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from ckptx.errors import ConversionError, PluginError
from ckptx.storage.open_files import Files, write_all
from ckptx.storage.source_file import SourceFile
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import Stored, stored

_ALIGNMENT = 64  # a cache line; keeps any dtype aligned
_BLOCK = 1 << 21  # elements of a decoded tensor that are copied at once


class Packed(Protocol):
    """A tensor that lies compressed."""

    def blocks(self) -> Iterable[bytes]:
        """Yield what it decodes to."""

    def tensor(self, file: SourceFile, offset: int, size: int) -> Stored:
        """Return where the tensor lies in what was decoded: ``size`` bytes from ``offset`` on."""


class Spool:
    """Appends tensors to the spool file at ``path``, which a loader lists in `Begin.files`."""

    _place, _choice = "next to the target", "target"

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        self._end = 0
        self._starts: list[int] = []
        self._packed: list[tuple[int, Packed | None]] = []

    @property
    def path(self) -> str:
        """Where the spool lies."""
        return self._path

    @property
    def nbytes(self) -> int:
        """The bytes that it holds, those that are not decoded yet included."""
        return self._end

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

    def reserve(self, packed: Packed, nbytes: int) -> int:
        """Return where a compressed tensor of ``nbytes`` will lie, row-major, once it is read."""
        with self._lock:
            start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            self._starts.append(start)
            self._packed.append((nbytes, packed))
            self._end = start + nbytes
        return start

    def decoded(self, offset: int, size: int | None) -> str:
        """Decode what lies compressed of ``size`` bytes from ``offset`` on; None means all.

        Returns:
            The path of the spool.

        Raises:
            FormatError: a tensor is damaged, or not the one that metadata describe.
            ConversionError: the disk is full, or the spool is closed.
        """
        with self._lock:
            first = max(0, bisect_right(self._starts, offset) - 1)
            stop = self._end if size is None else offset + size
            for number in range(first, bisect_left(self._starts, stop)):
                nbytes, packed = self._packed[number]
                if packed is not None and self._starts[number] + nbytes > offset:
                    self._decode(packed, self._starts[number], nbytes)
                    self._packed[number] = nbytes, None
            return self.path

    def _decode(self, packed: Packed, place: int, nbytes: int) -> None:
        """Decode behind everything else, and copy the tensor to its place."""
        start = end = self._next()
        for block in packed.blocks():
            self._write(memoryview(block), end)
            end += len(block)
        import numpy as np

        from ckptx.storage.gather import Gather

        with SourceFile(self.path) as file:  # opened anew: a file knows the size it was opened with
            tensor = packed.tensor(file, start, end - start)
        with closing(Files([self.path])) as files:
            gather, itemsize = Gather(files), ITEMSIZE[tensor.dtype]
            for first in range(0, tensor.numel, _BLOCK):
                count = min(_BLOCK, tensor.numel - first)
                values = np.empty(count * itemsize, np.uint8)
                gather.add_range(tensor, first, first + count, values)
                gather.run()
                self._write(values.data, place + first * itemsize)
        os.ftruncate(self._descriptor, self._end)

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
                f"the spool {self._place} cannot be written: {error.strerror}; free space or "
                f"choose another {self._choice}"
            ) from error


class TemporarySpool(Spool):
    """A spool of its own, made when it is first needed: in ``folder``, or for temporary files."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("")
        self._folder = folder or Path(tempfile.gettempdir())
        self._place, self._choice = f"in {self._folder}", "directory with --spool"
        self._file: SpoolFile | None = None
        self._making = threading.Lock()
        self._closed = False

    @property
    def path(self) -> str:
        """Where the spool lies; it is made if it was not.

        Raises:
            ConversionError: it is closed, or cannot be made.
        """
        with self._making:
            if self._closed:
                raise ConversionError("the checkpoint is closed: what it holds cannot be decoded")
            if self._file is None:
                self._file = SpoolFile(self._folder)
            return self._file.path

    def close(self) -> None:
        """Remove the spool."""
        super().close()
        with self._making:
            self._closed = True
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

    def __exit__(self, *_: object) -> None:
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
