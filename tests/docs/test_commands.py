"""Every command that a document shows is run, in order, or listed here with the reason why not."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from fnmatch import fnmatchcase

import pytest

from docs import refresh as docs

pytest.importorskip("peft")
pytest.importorskip("megatron.core")
furnish = pytest.importorskip("tests.docs.furnish", reason="transformers is not installed")

ROOT = docs.ROOT
DOCUMENTS = [*docs.documents(), ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*/README.md")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}

ELSEWHERE = {
    "docs/index.md": "tests/docs/test_docs.py",
    "docs/coming-from.md": "tests/scripts",
    "docs/generate.md": "tests/running/test_generate.py",
    "docs/security.md": "tests/hostile",
}
"""Pages whose commands another test runs."""

INSTALLS = "installs or sets up the machine; `make test` does it as its first step"
NOT_RUN = {
    "pip install *": INSTALLS,
    "git clone *": INSTALLS,
    "bash .ci/lowest": "runs tests",
    "python3 -m venv *": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    "ln -sfn *": INSTALLS,
    "python -m pytest *": "runs tests, among which this one is",
    "CKPTX_FAULTS=* python -m pytest *": "runs tests",
    "python -m tests.record.record *": "tests/record/test_record.py runs it",
    "python -m docs.refresh": "tests/docs/test_docs.py runs it with --check",
    "mkdocs build --strict": "tests/docs/test_docs.py runs it",
    "python benchmarks/bench.py *": "takes minutes, gigabytes and packages of other projects",
    "PYTHONPATH=~/modules python convert.py *": "tests/legacy/test_megatron_modules.py runs "
    "modules of Megatron's; a checkout is needed",
    "torchrun *": "tests/pipeline/test_torchrun.py starts one process per rank",
    "ckptx plugins": "docs/plugins.md shows it after an installation; tests/unit runs it",
    "ckptx convert * --to npz": "the plugin has to be installed; its own tests convert with it",
    "ckptx convert * --watch *": "goes on until a signal; tests/unit/cli/test_runs.py watches",
    "ckptx convert granite*": "the family has to be installed; its own tests convert with it",
    "ckptx convert model-npz *": "the plugin has to be installed; its own tests convert with it",
}
"""Patterns of commands that cannot run here, and why or where they do."""

BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHELLS = ("sh", "shell", "bash", "console")
OURS = re.compile(r"^\s*(\$ *)?(ckptx|python3? convert\.py) ", re.MULTILINE)


def shown(text: str) -> list[str]:
    """Return the commands of a document's shell blocks, without comments."""
    blocks = [block for _, language, block in BLOCK.findall(text) if language in SHELLS]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [one for line in lines for one in re.split(r"\s&&\s", line)]
    plain = [shlex.split(command, comments=True) for command in commands]
    return [shlex.join(words) for words in plain if words]


def excuse(command: str) -> str | None:
    """Return the pattern of `NOT_RUN` that a command matches, if one does."""
    written = command.replace("'", "")  # shlex.join quotes ~ and =
    return next((pattern for pattern in NOT_RUN if fnmatchcase(written, pattern)), None)


def run(command: str) -> int:
    """Run a command in this process, as far as a process of its own would make no difference."""
    words = shlex.split(command)
    if words[0] == "ckptx":
        return furnish.run(*words[1:])
    assert words[:2] == ["python", "convert.py"], f"{command}: list it in NOT_RUN, or run it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
    return int(end.value.code or 0)


def is_target_of_make(command: str) -> bool:
    """Whether a command is ``make`` with targets of the Makefile; which CI runs."""
    tool, *targets = shlex.split(command)
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^(\w[\w-]*):", makefile, re.MULTILINE))
    return tool == "make" and set(targets) <= known


def to_run(name: str) -> list[str]:
    commands = shown(TEXTS[name])
    return [one for one in commands if not is_target_of_make(one) and excuse(one) is None]


SLOW = ("docs/convert.md",)
SAMPLED = [pytest.param(one, marks=[pytest.mark.full] * (one in SLOW)) for one in furnish.PAGES]


@pytest.mark.parametrize("name", SAMPLED)
def test_commands_run(name, tmp_path, monkeypatch, capfd):
    """Every command of a page, in order, where only what the page names lies."""
    commands = to_run(name)
    assert commands
    monkeypatch.chdir(tmp_path)
    furnish.PAGES[name](tmp_path)
    for command in commands:
        assert run(command) == 0, f"{command}\n{capfd.readouterr().err}"


@pytest.mark.parametrize("name", [one for one in TEXTS if one not in {*furnish.PAGES, *ELSEWHERE}])
def test_no_command_is_forgotten(name):
    assert to_run(name) == [], "furnish the page, or list the commands in NOT_RUN"


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "docs/cli.md"])
def test_commands_stand_in_shell_blocks(name):
    """Else nothing would run them. The pages of help have examples, which tests/unit parses."""
    others = [block for _, language, block in BLOCK.findall(TEXTS[name]) if language not in SHELLS]
    assert [block for block in others if OURS.search(block)] == []


def test_no_list_is_longer_than_needed():
    shown_by = [command for text in TEXTS.values() for command in shown(text)]
    used = {pattern for command in shown_by if (pattern := excuse(command))}
    assert NOT_RUN.keys() - used <= {"torchrun *"}
    assert [
        test for name, test in ELSEWHERE.items() if name in TEXTS and not (ROOT / test).exists()
    ] == []
