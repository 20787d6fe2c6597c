"""A disk that is really full: a small tmpfs that only the conversion sees.

It, ``/dev/shm`` and the directory of temporary files are mounted in a namespace of their own, so no
other program can fill, empty or litter them. Where the system allows no such mounts these tests are
skipped, and the limit of file size in ``test_faults`` stands for the full disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .scene import CORE, EVERY, PATIENCE, SEEDS, STEPS, Scene

ROOM = 8 << 20  # bytes; more than the target and all around it
MOUNTS = """
set -e
mount -t tmpfs -o size=$2 full "$1/disk"
mount -t tmpfs shm /dev/shm
mount -t tmpfs temporary "$1/temporary"
echo mounted
read end
"""


class Apart(Scene):
    """A scene whose command runs where a small disk is mounted."""

    def __init__(self, place: Path, source: Path, seed: int) -> None:
        super().__init__(place, source, seed)
        for name in ("disk", "temporary"):
            (place / name).mkdir()
        command = ["unshare", "-rm", "sh", "-c", MOUNTS, "sh", str(place), str(ROOM)]
        self.holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if self.holder.stdout.readline() != b"mounted\n":
            _, why = self.holder.communicate()
            pytest.skip(f"no private mounts; a limit of file size is tested: {why.decode()[:80]}")
        pid = self.holder.pid
        self.prefix = ("nsenter", "-t", str(pid), "-U", "-m", "--preserve-credentials")
        self.seen = Path(f"/proc/{pid}/root")
        self.disk = self.seen / (place / "disk").relative_to("/")
        self.temporary = self.seen / (place / "temporary").relative_to("/")
        self.named, self.target = place / "disk" / "target", self.disk / "target"
        self.environment = {
            "TMPDIR": str(place / "temporary"),
            "CKPTX_FAULT_DISK": str(place / "disk"),
        }

    def partials(self) -> list[Path]:
        return list(self.disk.rglob("*.ckptx-partial"))

    def resize(self, nbytes: int) -> None:
        options = ("mount", "-o", f"remount,size={nbytes}", str(self.place / "disk"))
        subprocess.run([*self.prefix, *options], check=True, timeout=PATIENCE)

    def check_shared(self) -> None:
        """Check that no semaphore, shared memory or temporary file is left."""
        left = [*(self.seen / "dev/shm").iterdir(), *self.temporary.iterdir()]
        assert not left, self.says(f"left {left}")

    def close(self) -> None:
        self.holder.communicate(b"end\n", timeout=PATIENCE)


@pytest.fixture
def apart(tmp_path, sources, request) -> Iterator[Apart]:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no private mounts; a limit of file size is tested instead")
    scene = Apart(tmp_path / "scene", sources[0], request.node.callspec.params["seed"])
    yield scene
    scene.close()


def check_full(scene: Apart) -> int:
    """Check that one line names the disk; return how many bytes it says are missing."""
    scene.check_refusal(before=True)
    scene.check_source()
    scene.check_shared()
    line = next(line for line in scene.errors.splitlines() if line.startswith("error: "))
    named = re.search(rf"the disk {re.escape(str(scene.place / 'disk'))} has ", line)
    assert named or "the spool" in line, scene.says("the disk is not named")
    missing = re.search(r"\((\d+) bytes\) less than is needed", line)
    assert missing or "no free inode" in line or "the spool" in line, scene.says("not how much")
    return int(missing[1]) if missing else 0


@pytest.mark.parametrize("seed", SEEDS)
def test_too_small_a_disk_is_refused_before_the_first_byte(apart, sources, seed):
    needed = sum(
        -(-path.stat().st_size // 4096) * 4096
        for path in sources[2].rglob("*")
        if path.suffix == ".pt"
    )
    room = 4096 * apart.random.randrange(1, needed // 4096)
    apart.resize(room)
    assert apart.run(*CORE, *EVERY), apart.says("not refused")
    # Directories cost a tmpfs nothing; the lock is a page.
    assert check_full(apart) - (needed - room) in (0, 4096), apart.says("another size")
    assert not apart.partials(), apart.says("something is left")
    apart.resize(ROOM)
    assert apart.run(*CORE, *EVERY) == 0, apart.says("not converted")
    apart.check_end(sources[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disk_that_is_filled_meanwhile(apart, sources, seed):
    """Another program takes the room at some step after the check that there is enough."""
    role = apart.random.choice(["saver", "saver", "parent"])
    step = apart.random.randrange(1, STEPS if role == "saver" else 28)
    left = apart.random.choice([0, 0, 4096, 8192, apart.random.randrange(300_000)])
    apart.environment["CKPTX_FAULT_LEFT"] = str(left)
    if apart.run(*CORE, *EVERY, fault=f"{role} disk {step}"):
        if "is whole and in place" not in apart.errors:
            check_full(apart)
        (apart.disk / "ballast").unlink()
        assert apart.run(*CORE, *EVERY) == 0, apart.says("not continued")
    apart.check_end(sources[1])
    apart.check_shared()


@pytest.mark.parametrize("seed", SEEDS)
def test_whoever_is_killed_leaves_nothing_in_shared_memory(apart, sources, seed):
    for _ in range(2):
        role = apart.random.choice(["saver", "child", "parent"])
        step = apart.random.randrange(1, {"saver": STEPS, "child": 60, "parent": 26}[role])
        # Killed with all others, Python's resource tracker could not remove the semaphores.
        victim = "self" if role == "parent" else apart.random.choice(["self", "parent"])
        apart.run(*CORE, *EVERY, fault=f"{role} {victim} {step}")
        apart.check_shared()
    if not apart.whole():
        assert apart.run(*CORE, *EVERY) == 0, apart.says("not continued")
        apart.check_end(sources[1])
        apart.check_shared()
