"""Commands that were started once per rank: one of them works, all exit alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptx.processes import torchrun
from ckptx.registry import registry

ROOT = Path(registry.__file__).resolve().parents[2]
RANKS = 3


def environment(**changes: object) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in changes.items()}}


def together(rank: int, **changes: object) -> dict[str, str]:
    """What torchrun sets for a rank; all ranks on one machine."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    return environment(**{**said, "MASTER_PORT": os.getpid(), **changes})


def ckptx(*words: object, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ckptx", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def test_under_torchrun_one_rank_converts_and_all_exit_with_its_code(tmp_path, write_llama):
    source, target = write_llama(tmp_path / "source"), tmp_path / "target"
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command = [*launch, "-m", "ckptx", "convert", str(source), str(target), "--to", "core"]
    done, again = (
        subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("converted hf -> core") == 1
    assert "error:" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert again.returncode == 1
    assert again.stderr.count("error: ") == 1
    assert f"error: {target}/release: exists" in again.stderr


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--no-such-option",), 2)])
def test_ranks_that_come_early_or_late_exit_with_the_code_of_rank_0(
    words, code, tmp_path, write_llama
):
    line = ("convert", write_llama(tmp_path / "source"), tmp_path / "target", "--to", "hf", *words)
    started = [ckptx(*line, env=together(rank)) for rank in (1, 0)]
    started.append(ckptx(*line, env=together(2)))
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [code] * RANKS
    assert outputs[0] == outputs[2] == ("", "")
    assert (tmp_path / "target").exists() == (code == 0)


def rank_that(rank: int, work: str, patience: float = 60) -> subprocess.Popen[str]:
    """A process that does ``work`` if it is rank 0, and else waits for it."""
    text = (
        "import os, signal, sys, time\nfrom ckptx.processes import torchrun\n"
        f"torchrun.PATIENCE = {patience}\n"
        f"sys.exit(torchrun.once(['x'], lambda: {work}))"
    )
    command = [sys.executable, "-c", text]
    return subprocess.Popen(command, env=together(rank), stderr=subprocess.PIPE, text=True)


def test_nobody_waits_for_a_rank_0_that_dies():
    work = "time.sleep(1) or os.kill(os.getpid(), signal.SIGKILL)"
    processes = [rank_that(rank, work) for rank in (2, 1, 0)]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, -signal.SIGKILL]
    assert errors[0] == "error: rank 2: rank 0 died before it had finished; see its messages\n"


def test_nobody_waits_forever_for_ranks_that_do_not_come():
    leader, follower = rank_that(0, "7", patience=0.2), rank_that(1, "7", patience=0.2)
    for process in (leader, follower):
        process.communicate(timeout=30)
    assert leader.returncode == 7
    assert follower.returncode in (1, 7)  # it may come when rank 0 waits no more
    alone = rank_that(1, "7", patience=0.2)
    assert "rank 0 did not start this command" in alone.communicate(timeout=30)[1]
    assert alone.returncode == 1


LONG_WORK = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from ckptx.processes import torchrun

now = 0.0
torchrun.time = SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)

def work():
    global now
    address = torchrun._address(["x"]).replace("\\0", "@")
    # It listens, and somebody has come: two lines with its name.
    while Path("/proc/net/unix").read_text().count(address) < 2:
        time.sleep(0.01)
    now += torchrun.PATIENCE
    return 7

sys.exit(torchrun.once(["x"], work))
"""


def test_after_long_work_nobody_is_waited_for_but_those_that_have_come_are_told():
    """By a clock that stands still from the end of the work: waiting for others has no end."""
    leader = subprocess.Popen([sys.executable, "-c", LONG_WORK], env=together(0))
    follower = rank_that(1, "None", patience=1e9)
    for process in (leader, follower):
        process.communicate(timeout=120)
    assert [leader.returncode, follower.returncode] == [7, 7]


def test_who_waits_for_ranks_that_do_not_exist_is_told_why():
    errors = rank_that(0, "7", patience=8).communicate(timeout=30)[1]
    assert "rank 0 is done, and waits" in errors
    assert "2 of 2 other ranks to come; if there are none, unset RANK" in errors


def test_ranks_of_another_machine_do_nothing_and_say_so(tmp_path, write_llama):
    line = ("convert", write_llama(tmp_path / "source"), tmp_path / "target", "--to", "hf")
    elsewhere = {"WORLD_SIZE": 6, "GROUP_RANK": 1}
    first = ckptx(*line, env=together(3, LOCAL_RANK=0, **elsewhere))
    second = ckptx(*line, env=together(4, LOCAL_RANK=1, **elsewhere))
    assert first.communicate()[1].startswith("rank 3: rank 0 converts, on another machine")
    assert second.communicate() == ("", "")
    assert first.returncode == second.returncode == 0
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2"},  # a machine of Kubernetes' PyTorchJob
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_a_command_that_was_started_once_waits_for_nobody(said):
    assert torchrun.rank_place(said) is None
