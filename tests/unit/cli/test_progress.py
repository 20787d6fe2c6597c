"""What is shown while a conversion runs: on a terminal, in a log, and not at all."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from ckptx.cli import progress
from ckptx.cli.progress import Bar, Lines, Meter
from ckptx.protocol.progress import Progress

ROOT = Path(progress.__file__).resolve().parents[2]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7])[0-9;]*m")

DRIVER = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
from ckptx.cli import progress
shown = progress.choose(False)
shown.stage("planning")
shown._bar.refresh()
shown.begin(10 << 30)
for _ in range(5):
    shown.advance(1 << 30)
    shown._bar.refresh()
logging.warning("a warning in the middle")
shown.advance(5 << 30)
shown._bar.refresh()
shown.stage("publishing")
shown._bar.refresh()
shown.close()
print("the report", file=sys.stderr)
"""


def on_terminal(columns: int, *command: object, **environment: str) -> str:
    """Run Python on a terminal of so many columns; return all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**kept, "TERM": "xterm-256color", **environment},
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


@pytest.mark.parametrize("columns", [60, 200])
def test_bar_says_stage_bytes_speed_and_time_and_fits(columns):
    written = on_terminal(columns, "-c", DRIVER)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", written))]
    assert max(map(len, lines)) <= columns
    drawn = [line for line in lines if "GB/s" in line]
    size = r"\d+% of 10\.0 GiB" if columns < 76 else r"[\d.]+ \w+ of 10\.0 GiB"
    assert any(re.search(rf"^writing .*{size}, \d+\.\d\d GB/s, \d+ s left$", d) for d in drawn)
    for stage in ("planning", "syncing to disk", "publishing"):
        assert any(line.startswith(stage) for line in lines), stage
    assert "a warning in the middle" in lines
    assert lines[-2:] == ["the report", ""]
    assert COLOUR.search(written)


def test_no_color_is_heeded():
    assert not COLOUR.search(on_terminal(80, "-c", DRIVER, NO_COLOR="1"))


def test_conversion_on_a_terminal_ends_with_its_report(write_llama, tmp_path):
    write_llama(tmp_path / "llama")
    command = "from ckptx.cli.main import main; main()"
    words = ("convert", tmp_path / "llama", tmp_path / "out", "--to", "hf")
    written = on_terminal(72, "-c", command, *words)
    text = CONTROL.sub("", written.replace("\r", "\n"))
    assert "planning" in text
    assert re.search(r"^converted hf -> hf in \d+\.\d s", text, re.MULTILINE)
    assert re.search(r"^inexact   none: every value is the source's$", text, re.MULTILINE)


class Ticks(threading.Event):
    """An event that is waited for from tick to tick, and by no clock."""

    def __init__(self) -> None:
        super().__init__()
        self._ticks, self._waits = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.release()
        self._ticks.acquire()
        return self.is_set()

    def tick(self) -> None:
        """Let the time pass once, and what it brings about happen."""
        self._waits.acquire()
        self._ticks.release()
        self._waits.acquire()
        self._waits.release()

    def set(self) -> None:
        super().set()
        self._ticks.release()


def test_log_gets_plain_lines_also_while_nothing_is_written(caplog):
    lines, ticks = Lines(), Ticks()
    lines._over = ticks
    lines.stage("planning")
    ticks.tick()
    lines.begin(4 << 30)
    lines.advance(1 << 30)
    ticks.tick()
    lines.advance(3 << 30)
    ticks.tick()
    lines.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("planning: ")
    pattern = r"writing: 1\.0 GiB of 4\.0 GiB, \d+\.\d\d GB/s, \d+ s left"
    assert any(re.fullmatch(pattern, line) for line in told)
    assert told[-1].startswith("syncing to disk: 4.0 GiB, ")
    assert all(line.isprintable() for line in told)
    assert len(told) == 3
    assert not lines._thread.is_alive()  # so that nothing more is logged


def test_short_conversion_leaves_no_line_in_a_log(write_llama, tmp_path):
    write_llama(tmp_path / "llama")
    slowly = "progress.Lines.__init__.__defaults__ = (3600.0,)"  # however slow the machine is
    command = f"from ckptx.cli import main, progress; {slowly}; main.main()"
    words = ("convert", tmp_path / "llama", tmp_path / "out", "--to", "hf")
    done = subprocess.run(
        [sys.executable, "-c", command, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.isprintable() for line in done.stdout.splitlines())


def test_meter_knows_speed_of_late_and_time_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    meter = Meter()
    meter.begin(100 * 10**9)
    assert meter.text() == "0 bytes of 93.1 GiB, 0.00 GB/s, time left unknown"
    for _ in range(20):  # a slow start
        now += 1
        meter.advance(10**8)
    assert meter.speed == pytest.approx(10**8)
    for _ in range(20):
        now += 1
        meter.advance(2 * 10**9)
    assert meter.speed == pytest.approx(2 * 10**9)
    assert meter.text() == "39.1 GiB of 93.1 GiB, 2.00 GB/s, 29 s left"
    assert meter.text(short=True) == "42% of 93.1 GiB, 2.00 GB/s, 29 s left"
    meter.advance(58 * 10**9)
    assert (meter.now, meter.text()) == ("syncing to disk", "93.1 GiB, 40 s")


def test_what_is_chosen(monkeypatch):
    assert type(progress.choose(True)) is Progress
    assert isinstance(progress.choose(False), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress.choose(False), Bar)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.choose(False), Lines)


def test_bar_gives_the_log_its_stream_back(monkeypatch):
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger().addHandler(handler)
    try:
        bar = Bar()
        bar.begin(10)
        bar.advance(10)
        bar.close()
        bar.close()
        assert handler.stream is sys.__stderr__
    finally:
        logging.getLogger().removeHandler(handler)
