"""What bad input is told: exit code and error of every command that the hostile suite runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .program import ROOT

DISK = re.compile(r"the disk \S+ has [\d.]+ \w+ free, [\d.]+ \w+ \(\d+ bytes\) less than is needed")
LEFT_OUT = (
    "test_an_index_of_many_tensors",  # says nothing but that it does not fit
    "test_pickles",  # this and the next run no command
    "test_no_bomb_goes_off",
)


def entries(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return the entries of the whole suite."""
    with tempfile.TemporaryDirectory() as name:
        noted = Path(name, "noted")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "tests/hostile", "-q", "-n", "2"),
                *("-p", "no:cacheprovider", "-k", " and ".join(f"not {n}" for n in LEFT_OUT)),
            ],
            cwd=ROOT,
            env={**os.environ, "CKPTX_RECORD_HOSTILE": str(noted), "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:])  # noqa: T201
        found = {}
        for file in Path(name).glob("noted.*"):
            for line in file.read_text().splitlines():
                test, code, text = json.loads(line)
                said = " | ".join([f"exit {code}", *text.splitlines()])
                found[test.removeprefix("tests/hostile/")] = DISK.sub("the disk D is short", said)
    return found
