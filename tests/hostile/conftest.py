"""A user who runs the command on bad input, and looks at what is left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptx.cli import main as cli
from ckptx.registry import registry

PARTIAL = ".ckptx-partial"
ROOT = Path(registry.__file__).resolve().parents[2]
RECORD = os.environ.get("CKPTX_RECORD_HOSTILE", "")
"""Where commands are noted, a file for each worker; nowhere if empty."""
RECORDED: dict[str, int] = {}
"""Test to the commands that it has run."""


def fingerprint(root: Path) -> dict[str, str]:
    """The digest of every file below ``root``, and every directory."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        name = str(path.relative_to(root))
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory" if path.is_dir() else "absent"
    return found


class User:
    """Runs commands in a directory of their own; everything they may read is below it."""

    def __init__(self, place: Path, read_output: Callable[[], tuple[str, str]]) -> None:
        self.place = place
        self.source = place / "source"
        self.target = place / "target"
        self._read_output = read_output

    def run(self, *arguments: Any, entry: Callable[[list[str]], None] = cli.main) -> int:
        """Run a command of ckptx in this process; return its exit code."""
        self._read_output()
        with pytest.raises(SystemExit) as end:
            entry([str(argument) for argument in arguments])
        self.output, self.errors = self._read_output()
        return self._recorded(int(end.value.code or 0))

    def _recorded(self, code: int) -> int:
        """Note what a command has said, for ``tests.record``, if that is asked for."""
        if not RECORD:
            return code
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        number = RECORDED[test] = RECORDED.get(test, 0) + 1
        said = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        text = "\n".join(said).replace(str(self.place), "PLACE")
        text = text.replace(str(self.place.parent), "TMP").replace(str(ROOT), "CHECKOUT")
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        with Path(f"{RECORD}.{worker}").open("a") as file:
            file.write(json.dumps([f"{test} {number}", code, text]) + "\n")
        return code

    def run_apart(self, *arguments: Any, **settings: Any) -> int:
        """Run ``ckptx`` in a process of its own."""
        settings["env"] = {**os.environ, "PYTHONPATH": str(ROOT), **settings.get("env", {})}
        done = subprocess.run(
            [sys.executable, "-c", "from ckptx.cli.main import main; main()", *map(str, arguments)],
            capture_output=True,
            text=True,
            **settings,
        )
        self.output, self.errors = done.stdout, done.stderr
        return self._recorded(done.returncode)

    def is_refused(
        self, *arguments: Any, run: Callable[..., int] | None = None, **settings: Any
    ) -> str:
        """Run a command that must fail and leave no trace; return the one line that says why."""
        before = fingerprint(self.place)
        code = (run or self.run)(*arguments, **settings)
        assert code not in (0, None), self.output
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        assert "Traceback" not in self.errors
        assert "internal error" not in lines[0]
        assert fingerprint(self.place) == before
        assert not [path for path in self.place.rglob(f"*{PARTIAL}*")]
        return lines[0].removeprefix("error: ")

    def cannot_convert(self, saver: str = "core", *options: Any) -> str:
        """Convert source to target, which must fail; return the reason."""
        return self.is_refused("convert", self.source, self.target, "--to", saver, *options)


@pytest.fixture
def user(tmp_path, capfd):
    return User(tmp_path, lambda: tuple(capfd.readouterr()))


@pytest.fixture(scope="session")
def megatron(tmp_path_factory, write_llama):
    """Megatron checkpoints of the small Llama at TP2 PP2, by form."""
    place = tmp_path_factory.mktemp("megatron")
    source = write_llama(place / "hf")
    for form in ("torch_dist", "torch"):
        with pytest.raises(SystemExit) as end:
            cli.main(
                [
                    *("convert", str(source), str(place / form), "--to", "core", "--quiet"),
                    *("--tp", "2", "--pp", "2", "--ckpt-format", form, "--iteration", "7"),
                ]
            )
        assert not end.value.code
    return place


@pytest.fixture
def core(user, megatron):
    """A copy of such a checkpoint as the source; the path is its iteration directory."""

    def copied(form: str) -> Path:
        shutil.copytree(megatron / form, user.source)
        return user.source / "iter_0000007"

    return copied
