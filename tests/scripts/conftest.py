from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
from pathlib import Path

import pytest

from ckptx.cli import main as cli
from tests.docs.test_docs import DOCS, commands

from . import checkpoints


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Checkpoints as `checkpoints.make` names them; not to be changed."""
    place = tmp_path_factory.mktemp("saved")
    checkpoints.make(place)
    return place


@pytest.fixture(scope="session")
def documented(saved, tmp_path_factory):
    """The same place after every command of the document was typed there, in its order."""
    place = shutil.copytree(saved, tmp_path_factory.mktemp("documented") / "place")
    (place / "conf").mkdir()
    config = "convertor: {ckpt_path: full.pt, save_path: from-pt}\nmodel: {model_path: llama}\n"
    (place / "conf" / "fsdp_model_convertor.yaml").write_text(config)
    shown = commands(DOCS["docs/coming-from.md"])
    assert len(shown) > 20
    before = Path.cwd()
    os.chdir(place)
    try:
        for program, *words in shown:
            assert program == "ckptx"
            said = io.StringIO()
            with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said):
                cli.main(words)
            assert not end.value.code, f"{shlex.join(words)}\n{said.getvalue()}"
    finally:
        os.chdir(before)
    return place


class Shell:
    """Types commands of ckptx where the checkpoints are; outputs go to a directory of the test."""

    def __init__(self, out: Path, read_output) -> None:
        self.out = out
        self.read_output = read_output

    def script(self, *words: object) -> int:
        return self.ckptx("from-script", *words)

    def ckptx(self, *words: object) -> int:
        self.read_output()
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        self.output, self.errors = self.read_output()
        return int(end.value.code or 0)

    def lines(self, *words: object) -> list[list[str]]:
        """The commands that a script's arguments mean."""
        assert self.script(*words, "--print-only") == 0, self.errors
        return [shlex.split(line)[1:] for line in self.output.splitlines()]

    def refused(self, *words: object) -> str:
        """The one line that says why; nothing has been written."""
        assert self.script(*words) in (1, 2)
        assert not list(self.out.iterdir())
        (line,) = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert "internal error" not in line
        return line.removeprefix("error: ")


@pytest.fixture
def shell(saved, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(saved)
    return Shell(tmp_path, lambda: tuple(capfd.readouterr()))
