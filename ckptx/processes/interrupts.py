"""Signals that ask to stop, as something to wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The user stopped the conversion; ``signum`` is the signal. No failure, so no CkptxError.

    ``left`` says what of it is left.
    """

    def __init__(self, signum: int, left: str = "nothing was written") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {left}")
        self.signum = signum


class Interrupts:
    """Turns `STOPPING` into something to wait for; a context of the main thread.

    A SIGHUP that is ignored stays so: ``nohup`` asks for it.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """Become readable when a signal has come (`multiprocessing.connection.wait`)."""
        return self._reader

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signum:
            raise Interrupted(self.signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        with contextlib.suppress(OSError):  # full: it is readable already
            os.write(self._writer, b".")
