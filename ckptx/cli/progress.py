"""Progress of a conversion: counted in bytes, drawn on a terminal, logged elsewhere.

A terminal gets one line that is drawn again and again, and wiped at the end; a log gets a plain
line every some seconds, also while nothing is written (large checkpoints take long to plan, and to
reach the disk). What takes less than some seconds leaves no line in a log.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

from ckptx.protocol.progress import Progress
from ckptx.text.sizes import size_text

_log = logging.getLogger(__name__)
_INTERVAL = 10.0  # seconds between two log lines
_WINDOW = 10.0  # seconds that a speed is the mean of
_WIDEST = 100  # columns of a bar; a longer one says no more
_NARROW = 76  # columns below which sizes are shortened
_ENDS = {"writing": "syncing to disk"}
"""What a stage has become once all its bytes are done."""


class Meter(Progress):
    """Counts the bytes done, the recent speed, and the time that is left. Times are in seconds."""

    def __init__(self) -> None:
        self.doing = "starting"
        self.total = 0
        """Bytes; 0 where nothing is counted."""
        self.done = 0
        self._started = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def stage(self, name: str) -> None:
        """Begin a stage."""
        self.begin(0, name)

    def begin(self, total: int, stage: str = "writing") -> None:
        """Begin a stage of so many bytes."""
        self.doing, self.total, self.done = stage, total, 0
        self._started = time.monotonic()
        self._seen = deque([(self._started, 0)])
        self._show()

    def _show(self) -> None:
        """Show that a stage begins."""

    def advance(self, count: int) -> None:
        """Count bytes."""
        self.done += count
        now = time.monotonic()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW:
            self._seen.popleft()

    @property
    def now(self) -> str:
        """What is being done now."""
        return _ENDS.get(self.doing, self.doing) if self.complete else self.doing

    @property
    def complete(self) -> bool:
        """Whether all bytes of the stage are done."""
        return 0 < self.total <= self.done

    @property
    def seconds(self) -> float:
        """The time that the stage has taken so far."""
        return time.monotonic() - self._started

    @property
    def speed(self) -> float:
        """Bytes per second, recently."""
        since, before = self._seen[0] if self._seen else (self._started, 0)
        elapsed = time.monotonic() - since
        return (self.done - before) / elapsed if elapsed > 0 else 0.0

    def text(self, *, short: bool = False) -> str:
        """Return the numbers of the stage, for people."""
        if not self.total or self.complete:
            done = f"{size_text(self.total)}, " if self.total and not short else ""
            return f"{done}{_duration(self.seconds)}"
        speed = self.speed
        left = (
            f"{_duration((self.total - self.done) / speed)} left" if speed else "time left unknown"
        )
        if short:
            share = 100 * self.done // self.total
            return f"{share}% of {size_text(self.total)}, {speed / 1e9:.2f} GB/s, {left}"
        return f"{size_text(self.done)} of {size_text(self.total)}, {speed / 1e9:.2f} GB/s, {left}"


class Lines(Meter):
    """Logs a line every ``interval`` seconds, whatever is going on or not."""

    def __init__(self, interval: float = _INTERVAL) -> None:
        super().__init__()
        self._interval = interval
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Log nothing more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="progress")
            self._thread.start()

    def _run(self) -> None:
        # Signals are for the thread that watches the children.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._over.wait(self._interval):
            _log.warning("%s: %s", self.now, self.text())


class Bar(Meter):
    """Draws a line with a bar on the terminal, on stderr, and wipes it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._task: Any = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def advance(self, count: int) -> None:
        """Move the bar."""
        super().advance(count)
        self._bar.update(self._task, completed=self.done)

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            self._bar.stop()
            for handler, stream in self._streams:
                handler.setStream(stream)
            self._bar = None

    def _show(self) -> None:
        if self._bar is None:
            self._open()
        self._bar.reset(self._task)
        self._bar.tasks[0].total = self.total or None  # `reset` takes None for "as it was"

    def _open(self) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column
        from rich.text import Text

        meter = self
        console = Console(stderr=True)
        console.width = min(console.width, _WIDEST)

        class Stage(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                return Text(meter.now)

        class Numbers(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                return Text(meter.text(short=console.width < _NARROW))

        self._bar = progress.Progress(
            Stage(Column(no_wrap=True)),
            progress.BarColumn(bar_width=None),
            Numbers(Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        # Log records go above the bar, not through it: rich has replaced the stream.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                self._streams.append((handler, handler.setStream(sys.stderr)))


def bar(quiet: bool) -> Progress:
    """Return a bar on a terminal, nothing elsewhere or if ``quiet``."""
    return Bar() if sys.stderr.isatty() and not quiet else Progress()


def choose(quiet: bool) -> Progress:
    """Return a bar on a terminal, lines elsewhere, nothing if ``quiet``."""
    if quiet:
        return Progress()
    clever = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return Bar() if sys.stderr.isatty() and clever else Lines()


def _duration(seconds: float) -> str:
    """Return a time for people.

    Examples:
        >>> _duration(7.4), _duration(75), _duration(7384)
        ('7 s', '1 min 15 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
