"""Progress of a conversion: told in bytes, drawn on a terminal, logged elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Protocol

from ckptx.publish import size_text

_log = logging.getLogger(__name__)
_INTERVAL = 10.0  # seconds between two log lines


class Progress(Protocol):
    """Told how many bytes there are, and how many more were written."""

    def begin(self, total: int) -> None:
        """The plan is proved: ``total`` bytes are about to be written."""
        ...

    def advance(self, count: int) -> None:
        """``count`` more bytes were written."""
        ...

    def close(self) -> None:
        """Nothing more comes, for better or worse; called once, even without `begin`."""
        ...


class Silent:
    """Shows nothing."""

    def begin(self, total: int) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines(Silent):
    """Logs a line now and then."""

    def begin(self, total: int) -> None:
        """Start the clock; the first line comes after some seconds."""
        self._total, self._done, self._shown = total, 0, time.monotonic()

    def advance(self, count: int) -> None:
        """Count, and log if the last line is old."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= _INTERVAL:
            self._shown = now
            done, total = size_text(self._done), size_text(self._total)
            _log.warning("%s of %s written", done, total)


class Bar:
    """Draws a bar on the terminal, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, total: int) -> None:
        """Draw the empty bar."""
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def advance(self, count: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, count)

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            self._bar.stop()


def choose(quiet: bool) -> Progress:
    """Return a bar on a terminal, lines elsewhere, nothing if ``quiet``."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
