"""Open files, a bounded number of them."""

from __future__ import annotations

import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ckptx.errors import ConversionError, CutShortError

_MAX_OPEN = 256


class OpenFiles:
    """Descriptors by path, opened on demand; those that were used longest ago are closed.

    At most ``most`` stay open, and at most a quarter of what the process may have: two checkpoints,
    or sources and targets, are open at once; pipes and libraries need the rest.
    """

    def __init__(self, flags: int = os.O_RDONLY, most: int = 0) -> None:
        most = most or _MAX_OPEN
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = allowed == resource.RLIM_INFINITY
        self._most = most if unlimited else max(1, min(most, allowed // 4))
        self._flags = flags | os.O_CLOEXEC
        self._open: OrderedDict[str, int] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, path: str) -> Iterator[int]:
        """Lend the descriptor of a file, which stays open meanwhile.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            if path not in self._open:
                idle = [other for other in self._open if not self._users[other]]
                for other in idle[: max(0, len(self._open) - self._most + 1)]:
                    os.close(self._open.pop(other))
                self._open[path] = os.open(path, self._flags)
            self._open.move_to_end(path)
            self._users[path] += 1
            descriptor = self._open[path]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1

    def close(self, path: str | None = None) -> None:
        """Close one file, unless somebody uses it; by default all."""
        with self._lock:
            for each in [path] if path is not None else list(self._open):
                if path is None or (each in self._open and not self._users[each]):
                    os.close(self._open.pop(each))


class PackedFile(str):
    """The path of a source file whose tensors lie compressed: they are decoded when they are read.

    Offsets are those in the decoded file, which `decoded` names once the bytes that are asked for
    lie in it. Another process is sent that file, with all of it decoded.
    """

    decoded: Callable[[int, int | None], str]
    """Decode ``size`` bytes from ``offset`` on, None for all; return the path of where they are."""

    @classmethod
    def of(cls, path: str, decoded: Callable[[int, int | None], str]) -> PackedFile:
        """Return the path of a file, with what decodes it."""
        packed = cls(path)
        packed.decoded = decoded
        return packed

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.decoded(0, None),)


class Files:
    """Source files by their number."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open = OpenFiles()
        self.close = self._open.close

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` bytes on.

        Raises:
            ConversionError: the file cannot be opened, or ends too early.
            CutShortError: it cannot be read: a disk or a network may be well again later.
            FormatError: it is compressed, and cannot be decoded.
        """
        path, problem = self.paths[file], "opened"
        place = path.decoded(offset, len(buffer)) if isinstance(path, PackedFile) else path
        try:
            with self._open.descriptor(place) as descriptor:
                problem = "read"
                count = read_all(descriptor, offset, buffer)
        except OSError as error:
            kind = CutShortError if problem == "read" else ConversionError
            raise kind(f"{path}: cannot be {problem}: {error.strerror}") from error
        if count < len(buffer):
            raise ConversionError(
                f"{path}: ends at byte {offset + count}, expected data up to byte "
                f"{offset + len(buffer)}; the file was cut or changed while it was read"
            )


def read_all(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fill ``buffer`` from byte ``offset`` on; return how many bytes the file has of it."""
    done = 0
    while done < len(buffer):
        if not (count := os.preadv(descriptor, [buffer[done:]], offset + done)):
            break
        done += count
    return done


def write_all(descriptor: int, offset: int, data: memoryview | bytes) -> None:
    """Write all of ``data`` at byte ``offset``."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
