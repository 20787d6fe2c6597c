"""A conversion that is disturbed, and what must hold whatever happens to it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from ckptx.registry import registry
from tests.pipeline.conftest import session, wait_for

ROOT = Path(registry.__file__).resolve().parents[2]
INJECTED = Path(__file__).parent / "injected"
COUNT = int(os.environ.get("CKPTX_FAULTS", "1"))
FIRST = int(os.environ.get("CKPTX_FAULTS_FIRST_SEED", "0"))
SEEDS = range(FIRST, FIRST + COUNT)
CORE = ("--to", "core", "--tp", "2", "--pp", "2", "--ckpt-format", "torch")
EVERY = ("--journal-every", "100K")
STEPS = 440  # about as many as the saver takes
LATE = range(330, 430)  # some of those after which the journal has records
PUBLISHING = range(13, 26)  # the parent's last steps
PATIENCE = 600.0  # seconds that an event may take on a busy machine before it counts as lost
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 256, "vocab_size": 512}


def digests(root: Path) -> dict[str, str]:
    """Return the digest of every file below ``root``."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


class Scene:
    """A directory with a source and a place for the target, and all that is random about it."""

    def __init__(self, place: Path, source: Path, seed: int) -> None:
        self.place, self.seed, self.random = place, seed, random.Random(seed)
        self.source, self.target = place / "source", place / "target"
        self.log = place.parent / f"{place.name}.log"
        self.prefix: tuple[str, ...] = ()  # of the command
        self.named = self.target  # what the command calls the target
        self.environment: dict[str, str] = {}
        self.synced: dict[str, int] = {}  # path to bytes
        place.mkdir()
        shutil.copytree(source, self.source)
        self.before = digests(self.source)

    def start(self, *options: str, fault: str = "", **more: object) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{INJECTED}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CKPTX_FAULT": fault,
            "CKPTX_FAULT_LOG": str(self.log),
            "CKPTX_FAULT_SCENE": str(self.place),
            **self.environment,
        }
        code = "from ckptx.cli.main import main; main()"
        command = [*self.prefix, sys.executable, "-c", code, "convert"]
        return subprocess.Popen(
            [*command, str(self.source), str(self.named), *options],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def run(self, *options: str, fault: str = "", **more: object) -> int:
        """Convert; whatever happens, nobody is left and the source is as it was."""
        process = self.start(*options, fault=fault, **more)
        _, self.errors = process.communicate(timeout=PATIENCE)
        wait_for(lambda: not session(process.pid), PATIENCE)
        return process.returncode

    def says(self, text: str) -> str:
        return f"seed {self.seed}: {text}\n{self.errors}"

    def check_refusal(self, *, before: bool = False) -> None:
        """Check that a run that failed says why in one line, and left at most a journalled part."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.says("not one line")
        assert "internal error" not in lines[0], self.says("internal error")
        assert "Traceback" not in self.errors, self.says("traceback")
        assert not self.whole(), self.says("something is at the target")
        if self.partials() and not before:
            assert "are kept in" in lines[0], self.says(f"silently left {self.partials()}")

    def whole(self) -> list[Path]:
        """Return the files at the target; what is staged is not at the target."""
        return [
            path
            for path in self.target.rglob("*")
            if path.is_file() and not any(p.endswith(".ckptx-partial") for p in path.parts)
        ]

    def partials(self) -> list[Path]:
        return list(self.place.rglob("*.ckptx-partial"))

    def check_end(self, expected: dict[str, str]) -> None:
        assert digests(self.target) == expected, self.says("another result")
        assert not self.partials(), self.says("a partial directory is left")
        self.check_source()

    def check_source(self) -> None:
        assert digests(self.source) == self.before, self.says("the source was touched")
