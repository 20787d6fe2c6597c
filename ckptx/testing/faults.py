"""Faults to inject: what copying, disks and people do to checkpoints."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file to a part of its size; at least one byte goes."""
    size = path.stat().st_size
    os.truncate(path, max(0, min(size - 1, int(size * keep))))


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Invert the bits of ``mask`` in the byte at ``offset``; negative counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def drop(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def duplicate(path: Path, name: str) -> Path:
    """Copy a file beside itself under another name and return the copy."""
    return Path(shutil.copy(path, path.with_name(name)))


@contextmanager
def failing_reads(after: int, code: int = errno.EIO) -> Iterator[None]:
    """Let tensor reads of this process fail with an error once ``after`` bytes were read."""
    genuine, lock, left = os.preadv, threading.Lock(), after

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        nonlocal left
        with lock:
            left -= sum(len(buffer) for buffer in buffers)
            if left < 0:
                raise OSError(code, os.strerror(code))
        return genuine(descriptor, buffers, offset, flags)

    with mock.patch.object(os, "preadv", preadv):
        yield
