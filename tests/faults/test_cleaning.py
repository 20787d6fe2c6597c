"""Killed at each step from the target's rename to the end of the cleaning, one after the other.

Only the owner of the target runs, in a process of its own; so every step is tried every day.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptx.errors import PlanError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import FilePlan
from ckptx.writing import atomic, journal
from ckptx.writing.publish import Target

IDENTITY = journal.Identity("plan", "sources", "versions", "xxh3_128")
OTHER = journal.Identity("another plan", "sources", "versions", "xxh3_128")
PLAN = SavePlan(
    [FilePlan("a.pt", 4, ()), FilePlan("b/c.pt", 4, ())],
    directory="release",
    pointers={"latest": b"release"},
)
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "os.listdir", "os.scandir")


def apart(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; return its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after_rename(step: int) -> None:
    """Let this process die at a step after the target was renamed; 0 is the step just after."""
    passed = -1
    exchange = atomic._renameat2

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal passed
        renamed = event == "os.rename" and str(arguments[1]).endswith("release")
        if event in STEPS and (passed >= 0 or renamed):
            passed += 1
            if passed == step + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def exchanged(source: Path, target: Path, flags: int) -> bool:
        nonlocal passed
        done = exchange(source, target, flags)  # no audit event tells of it
        passed = 0
        return done

    atomic._renameat2 = exchanged
    sys.addaudithook(count)


def write(place: Path, overwrite: bool = False, identity: journal.Identity = IDENTITY) -> None:
    with Target(place / "target", [], "foreign" if overwrite else False) as target:
        staging = target.prepare(PLAN, identity)
        if not target.published:
            (staging / "b").mkdir(exist_ok=True)
            for file in PLAN.files:
                (staging / file.path).write_bytes(b"new!")
            with journal.Journal(staging.with_name(journal.NAME), identity) as record:
                record.record({0: b"digest"}, 4)
        target.publish()


def write_old(place: Path) -> None:
    old = place / "target" / "release"
    (old / "b").mkdir(parents=True)
    (old / "b" / "old").write_bytes(b"old")
    (place / "target" / "latest").write_bytes(b"older")


def names(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


WHOLE = {"target/release/a.pt", "target/release/b/c.pt", "target/latest"}


def killed_runs(place: Path, overwrite: bool) -> list[Path]:
    """Return a directory for each step at which a run was killed after the target had appeared."""
    found: list[Path] = []
    while True:
        here = place / str(len(found))
        here.mkdir()
        if overwrite:
            write_old(here)

        def work(here: Path = here, step: int = len(found)) -> None:
            kill_after_rename(step)
            write(here, overwrite)

        if not (status := apart(work)):
            return found
        assert status == -signal.SIGKILL
        found.append(here)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "replaced"])
def test_the_same_command_ends_what_was_killed(tmp_path, overwrite):
    """It succeeds, or finds all done and refuses the target; nothing is left in either case."""
    places = killed_runs(tmp_path, overwrite)
    assert len(places) > 5
    refused: list[Path] = []
    refused_why: set[str] = set()
    for place in places:
        assert names(place) >= WHOLE - {"target/latest"}
        try:
            write(place, overwrite)
        except PlanError as error:
            refused_why.add(str(error).partition(": ")[2].partition(": ")[0])
            refused.append(place)
        assert names(place) == WHOLE, place
        assert (place / "target/latest").read_bytes() == b"release"
        assert {path.name for path in (place / "target").iterdir()} == {"release", "latest"}
    assert refused_why <= {
        "exists, and holds 2 files (8 bytes) not written by ckptx or changed since"
    }
    # Only when all was done but to remove what nobody needs.
    assert refused == ([] if overwrite else places[len(places) - len(refused) :])
    assert len(refused) < len(places)


def test_another_command_removes_what_nobody_needs_and_keeps_the_rest(tmp_path):
    for place in killed_runs(tmp_path, False):
        partial = place / "target" / "release.ckptx-partial"
        needed = (partial / journal.NAME).exists()
        with pytest.raises(PlanError, match="exists, and holds 2 files"):
            write(place, identity=OTHER)
        assert partial.exists() == needed
        assert names(place) >= WHOLE - {"target/latest"}
