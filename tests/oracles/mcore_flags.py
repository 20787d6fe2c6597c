"""Command lines read by the argument parser of a real Megatron, in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.oracles import mcore_versions


def left_over(lines: Sequence[Sequence[str]], version: str) -> list[list[str]]:
    """Return the words of each command line that Megatron's parser does not take."""
    home = mcore_versions.place(version)
    assert home is not None
    paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")]), *map(str, _roots())]
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.mcore_flags"],
        input=json.dumps(lines),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _roots() -> list[Path]:
    return [Path(__file__).resolve().parents[2]]


def _main() -> None:
    mcore_versions.install()
    arguments = importlib.import_module("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    lines = json.load(sys.stdin)
    sys.stdout.write(json.dumps([parser.parse_known_args(line)[1] for line in lines]))


if __name__ == "__main__":
    _main()
