"""Bounded reads from checkpoint files: the only way containers look at bytes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ckptx.errors import FormatError


def read_small(path: str | os.PathLike[str], limit: int = 64 << 20) -> bytes:
    """Return the bytes of a small file: no device, no pipe, at most ``limit`` bytes.

    Raises:
        FormatError: it is something else, or cannot be read.
    """
    with SourceFile(path) as file:
        if file.size > limit:
            raise FormatError(
                f"{file.path}: expected at most {limit} bytes, found {file.size}; "
                "this is not the file that its name says"
            )
        return file.read(0, file.size)


def read_json(path: str | os.PathLike[str], limit: int = 64 << 20) -> dict[str, Any]:
    """Return the JSON object in a small file.

    Raises:
        FormatError: it holds something else, or cannot be read.
    """
    return json_object(path, read_small(path, limit))


def json_object(path: str | os.PathLike[str], content: bytes) -> dict[str, Any]:
    """Return the JSON object that ``content``, of the file ``path``, is.

    Raises:
        FormatError: it is something else.
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise FormatError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that stands for a large one in a repository."""


class SourceFile:
    """A file that is read in small spans, never mapped: a truncated file is an error, not SIGBUS.

    Attributes:
        path: as given, for error messages.
        size: in bytes, when it was opened.
    """

    __slots__ = ("_descriptor", "path", "size")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._descriptor)
        except OSError as error:
            missing = "; the checkpoint is not whole, copy it again"
            advice = missing if isinstance(error, FileNotFoundError) else ""
            raise FormatError(f"{self.path}: cannot be opened: {error.strerror}{advice}") from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError(f"{self.path}: expected a regular file; give the checkpoint itself")
        self.size = status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from byte ``offset`` on.

        Raises:
            FormatError: the file ends before, or the device fails.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FormatError(
                f"{self.path}: expected {size} bytes at offset {offset}, the file has {self.size}; "
                f"it is truncated or damaged, copy it again"
            )
        spans = []
        while size:
            try:
                span = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise FormatError(
                    f"{self.path}: cannot be read at {offset}: {error.strerror}"
                ) from error
            if not span:
                raise FormatError(f"{self.path}: shrank to {offset} bytes while it was read")
            spans.append(span)
            offset += len(span)
            size -= len(span)
        return spans[0] if len(spans) == 1 else b"".join(spans)

    def refuse_pointer(self) -> None:
        """Refuse what a clone without git-lfs has in place of a large file.

        Such a pointer is text of less than 1024 bytes, whose first line is the version of the
        specification (git-lfs/git-lfs docs/spec.md @ v3.5.1).

        Raises:
            FormatError: the file is a pointer.
        """
        if len(LFS_POINTER) <= self.size < 1024 and self.read(0, len(LFS_POINTER)) == LFS_POINTER:
            raise FormatError(
                f"{self.path}: is a pointer of Git LFS, not the weights themselves; run "
                "'git lfs pull' in its repository, or download the file"
            )

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
