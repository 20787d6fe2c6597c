"""The program, as the record runs it. Nothing else here imports ckptx: what moves, moves here."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ckptx.cli import main as cli
from ckptx.cli.main import convert as megatron_command
from ckptx.cli.main import main as short_command
from ckptx.conversion import engine, supervisor
from ckptx.registry import registry
from ckptx.testing.models import MIXTURES, MODELS, OLMOE, PADDED, TinyModel
from ckptx.testing.models import tiny as tiny_model
from ckptx.version import __version__

__all__ = ["MIXTURES", "MODELS", "OLMOE", "PADDED", "ROOT", "TinyModel", "tiny_model"]

ROOT = Path(cli.__file__).resolve().parents[2]
"""The checkout."""
ENTRY = "from ckptx.cli.main import main; main()"
LENGTH = 72  # characters of the path of a place, which decide where lines are broken
Entry = Callable[[list[str]], None]


@dataclass(frozen=True)
class Done:
    """What a command has said."""

    code: int
    output: str
    errors: str

    def text(self) -> str:
        """Return all of it as one text."""
        said = f"{self.output}{self.errors}"
        return said if self.code == 0 else f"{said}exit {self.code}\n"


class Place:
    """A directory whose path has a fixed length, and texts without it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def told(self, text: str) -> str:
        """Return a text without what depends on machine, time and release."""
        text = text.replace(str(self.root), "PLACE").replace(str(ROOT), "CHECKOUT")
        text = re.sub(r"\b(in|of|took) \d+\.\d+ s\b( \(\d+\.\d+ GB/s\))?", r"\1 T s", text)
        text = re.sub(r"at most [\d.]+ [KMGT]?i?B of\s+memory", "at most M of memory", text)
        text = re.sub(r'"(seconds|gb_per_second|peak_memory)": [\d.]+', r'"\1": 0', text)
        return text.replace(__version__, "VERSION")


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Make a place below the directory for temporary files, and remove it."""
    base = Path(tempfile.mkdtemp(prefix="record-")).resolve()
    missing = LENGTH - len(str(base)) - 1
    if missing < 1:
        base.rmdir()
        raise SystemExit(f"error: {base}: is too long; set TMPDIR to a shorter path")
    try:
        (base / ("x" * missing)).mkdir()
        yield Place(base / ("x" * missing))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def run(*words: str | Path, entry: Entry = short_command) -> Done:
    """Run a command in this process; what it converts, it converts here."""
    output, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    logging.getLogger().handlers.clear()  # they hold the streams of the command before
    with (
        mock.patch.object(supervisor, "convert", lambda job, shown: engine.convert(job, shown)),
        mock.patch.object(os, "fsync"),
        mock.patch.object(os, "fdatasync"),
        mock.patch.dict(os.environ, {"COLUMNS": "80", "LINES": "24"}),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            entry([str(word) for word in words])
        except SystemExit as end:
            code = end.code or 0
    return Done(int(code), output.getvalue(), errors.getvalue())


def run_megatrons(*words: str | Path) -> Done:
    """Run ``convert.py`` in this process."""
    return run(*words, entry=megatron_command)


def run_apart(*words: str | Path, cwd: Path | None = None) -> Done:
    """Run the real command, in processes of its own."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, *map(str, words)],
        env={**os.environ, "COLUMNS": "80", "LINES": "24", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def names(kind: str) -> Sequence[str]:
    """Return the loaders or savers that come with the program."""
    return sorted(registry.names(kind))
