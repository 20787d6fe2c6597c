"""Open files, a bounded number of them."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence

from ckptx.errors import ConversionError, CutShortError

_MAX_OPEN = 256


def most_open(wanted: int) -> int:
    """Return how many files may stay open of ``wanted``: a quarter of what the process may have.

    Two checkpoints, or sources and targets, are open at once; pipes and libraries need the rest.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if allowed == resource.RLIM_INFINITY else max(1, min(wanted, allowed // 4))


class Files:
    """Source files by their number, opened on demand; at most a few hundred stay open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._most = most_open(_MAX_OPEN)
        self._lock = threading.Lock()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` bytes on.

        Raises:
            ConversionError: the file cannot be read, or ends too early.
        """
        descriptor = self._acquire(file)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise ConversionError(
                        f"{self.paths[file]}: ends at byte {offset + done}, expected data up to "
                        f"byte {offset + len(buffer)}; the file was cut or changed while it was "
                        "read"
                    )
                done += count
        except OSError as error:  # a disk or a network that may be well again later
            raise CutShortError(f"{self.paths[file]}: cannot be read: {error.strerror}") from error
        finally:
            self._release(file)

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _acquire(self, file: int) -> int:
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is None:
                self._close_idle()
                try:
                    descriptor = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise ConversionError(
                        f"{self.paths[file]}: cannot be opened: {error.strerror}"
                    ) from error
                self._open[file] = descriptor
            self._open.move_to_end(file)
            self._users[file] = self._users.get(file, 0) + 1
            return descriptor

    def _release(self, file: int) -> None:
        with self._lock:
            self._users[file] -= 1

    def _close_idle(self) -> None:
        if len(self._open) < self._most:
            return
        for file in list(self._open):
            if not self._users.get(file):
                os.close(self._open.pop(file))
                return
