"""What parent and child processes tell each other, and how a child is set up and brought down."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptx import errors
from ckptx.errors import CkptxError, ConversionError
from ckptx.processes.interrupts import STOPPING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
_PROGRESS_INTERVAL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of a child, as plain text: its class may not be importable in the parent."""

    kind: str
    """The nearest class of `ckptx.errors`; empty for an exception that is none of ours."""
    message: str
    trace: str
    when: float

    @classmethod
    def of(cls, error: BaseException, who: str) -> Failure:
        """Return the failure that ``error`` means for ``who`` (``"loader 'hf'"``)."""
        kind, message = "", str(error)
        if isinstance(error, CkptxError):
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
        elif isinstance(error, SystemExit):
            message = f"{who} called exit({'' if error.code is None else error.code!r})"
        elif isinstance(error, MemoryError):
            kind, message = "CutShortError", f"{who}: memory ran out"
        else:
            message = f"{who} failed: {type(error).__name__}: {message}".rstrip(": ")
        return cls(kind, message, "".join(traceback.format_exception(error)), time.monotonic())

    def error(self) -> CkptxError:
        """Return it as an exception of ckptx."""
        if self.kind:
            error: CkptxError = getattr(errors, self.kind)(self.message)
            return error
        return ConversionError(f"{self.message}; nothing was written")

    def exception(self) -> CkptxError:
        """Return it as an exception of the parent; the child's traceback is a note."""
        error = self.error()
        error.add_note(f"\nIn the child process:\n{self.trace}")
        return error


class Channel:
    """A child's line to its parent: log records, progress, questions and the result."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._bytes = 0
        self._sent = 0.0

    def send(self, tag: str, content: Any) -> None:
        """Tell the parent something, from any thread."""
        with self._lock:
            self._connection.send((tag, content))

    def ask(self, tag: str, content: Any) -> Any:
        """Tell the parent something and wait for its answer."""
        self.send(tag, content)
        return self._connection.recv()

    def advance(self, count: int) -> None:
        """Report bytes written; many small steps travel as one."""
        with self._lock:
            self._bytes += count
            now = time.monotonic()
            if now - self._sent >= _PROGRESS_INTERVAL:
                self._connection.send(("progress", self._bytes))
                self._bytes, self._sent = 0, now

    def flush(self) -> None:
        """Send the progress that is still held back."""
        with self._lock:
            self._connection.send(("progress", self._bytes))
            self._bytes = 0


class _Forward(logging.Handler):
    """Hands log records to the parent."""

    def __init__(self, line: Channel) -> None:
        super().__init__()
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        with contextlib.suppress(OSError):  # the parent is gone, and so are we soon
            self.line.send("log", record)


def settle_child(parent: int, line: Channel, log_level: int) -> None:
    """Make this child die with its parent, leave signals to it, and log through it."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a copy of the parent has the parent's handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    # What a plugin prints must not end up in the JSON on stdout.
    os.dup2(sys.__stderr__.fileno() if sys.__stderr__ else 2, 1)
    root = logging.getLogger()
    root.handlers = [_Forward(line)]
    root.setLevel(log_level)


def die_with(parent: int) -> None:
    """Make this process die when ``parent``, its parent's process id, does."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux include/uapi/linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request above
        os._exit(1)


def module_command(module: str, *words: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment that run a module of this ckptx in a process of its own."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", "-m", module, *words], {**os.environ, "PYTHONPATH": path}


def stop(children: list[BaseProcess]) -> None:
    """End children: politely, and after a while by force. Returns when they are gone."""
    for child in children:
        if child.is_alive():
            child.terminate()
    deadline = time.monotonic() + GRACE
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()


def manner_of_death(exitcode: int | None) -> str:
    """Return how a process ended that had not finished its work."""
    if exitcode is None or exitcode == 0:
        return "stopped early, with exit code 0 and without finishing"
    if exitcode > 0:
        return f"stopped with exit code {exitcode}"
    try:
        name = f"signal {-exitcode} ({signal.Signals(-exitcode).name})"
    except ValueError:
        name = f"signal {-exitcode}"
    hint = ", perhaps because memory ran out" if exitcode == -signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
