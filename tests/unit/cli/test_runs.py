"""``convert --all-steps`` and ``--watch``; no test waits for a clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptx.cli import runs
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CutShortError
from ckptx.processes.interrupts import Interrupted
from ckptx.registry.runs import later_than_named, signature, steps, still_written

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def a_run(tmp_path, write_llama) -> Path:
    """Return a run of three steps as the Trainer names them, whose order is not that of names."""
    for number, layers in ((5, 2), (10, 3), (100, 4)):
        write_llama(tmp_path / "run" / f"checkpoint-{number}", num_hidden_layers=layers)
    return tmp_path / "run"


def outcomes(out: str) -> dict[str, str]:
    found = [json.loads(line) for line in out.splitlines()]
    return {one["step"]: one["outcome"] for one in found}


def test_each_step_has_its_own_target_and_is_passed_over_later(a_run, tmp_path, run):
    (a_run / "logs").mkdir()
    command = ("convert", a_run, tmp_path / "out", "--to", "hf", "--all-steps", "--verify")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.endswith("3 steps: 3 converted\n")
    for step in ("checkpoint-5", "checkpoint-10", "checkpoint-100"):
        made, source = (place / step / "config.json" for place in (tmp_path / "out", a_run))
        assert json.loads(made.read_text()) == json.loads(source.read_text())
    code, out, err = run(*command, "--json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["step"] for line in out.splitlines()] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert set(outcomes(out).values()) == {"passed over"}


def test_what_is_not_the_same_conversion_is_not_passed_over(a_run, tmp_path, run):
    command = ("convert", a_run, tmp_path / "out", "--to", "hf", "--all-steps", "--json")
    assert run(*command)[0] == 0
    with (tmp_path / "out/checkpoint-5/config.json").open("a") as file:
        file.write(" ")
    newer = tmp_path / "out/checkpoint-10/ckptx-manifest.json"
    weights = a_run / "checkpoint-10/model.safetensors"
    later = newer.stat().st_mtime_ns + 1
    os.utime(weights, ns=(later, later))
    code, out, err = run(*command)
    assert code == 1
    expected = {"checkpoint-5": "failed", "checkpoint-10": "failed"}
    assert outcomes(out) == expected | {"checkpoint-100": "passed over"}
    assert err.count(": exists") == 2
    code, out, _ = run(*command, "--overwrite=foreign")
    assert code == 0
    expected = dict.fromkeys(expected, "converted")
    assert outcomes(out) == expected | {"checkpoint-100": "passed over"}
    assert set(outcomes(run(*command, "--dtype", "bf16")[1]).values()) == {"failed"}


def test_another_run_of_the_same_model_is_not_passed_over(a_run, tmp_path, run):
    other = tmp_path / "other"
    shutil.copytree(a_run, other)
    for number in (5, 10, 100):
        weights = other / f"checkpoint-{number}/model.safetensors"
        tensors = load_file(weights)
        tensors["model.norm.weight"] += np.float32(2**-20)
        save_file(tensors, weights, {"format": "pt"})
        before = (a_run / f"checkpoint-{number}/model.safetensors").stat()
        os.utime(weights, ns=(before.st_mtime_ns, before.st_mtime_ns))
    options = (tmp_path / "out", "--to", "hf", "--all-steps", "--json")
    assert run("convert", a_run, *options)[0] == 0
    code, out, err = run("convert", other, *options)
    assert code == 1
    assert set(outcomes(out).values()) == {"failed"}
    assert err.count(": exists") == 3


def test_a_step_that_fails_is_named_and_the_others_run(a_run, tmp_path, run):
    (a_run / "checkpoint-10/model.safetensors").write_bytes(b"")
    code, out, err = run("convert", a_run, tmp_path / "out", "--to", "hf", "--all-steps")
    assert code == 1
    assert err.startswith("error: checkpoint-10: ")
    assert err.count("\n") == 1
    assert out.endswith("3 steps: 2 converted, 1 failed (checkpoint-10)\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-100",
        "checkpoint-5",
    ]


def test_a_target_that_differs_stays_a_failure(a_run, tmp_path, run, monkeypatch):
    command = ("convert", a_run, tmp_path / "out", "--to", "hf", "--all-steps", "--json")
    assert run(*command)[0] == 0
    weights = tmp_path / "out/checkpoint-5/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert ": exists" in run(*command)[2]
    # Where no sample hits the difference, only --verify finds it.
    monkeypatch.setattr("ckptx.verification.converted.holds_samples", lambda *_: True)
    assert run(*command)[0] == 0
    code, out, err = run(*command, "--verify")
    assert code == 1
    assert outcomes(out)["checkpoint-5"] == "failed"
    assert "checkpoint-5: differs from its source" in err


def test_a_megatron_root_has_iterations_and_its_tracker_is_right(a_run, tmp_path, run, write_llama):
    for step in a_run.iterdir():
        shutil.rmtree(step)
    for number in (5, 20):
        write_llama(a_run / f"checkpoint-{number}")
    root = tmp_path / "megatron"
    command = ("convert", a_run, root, "--to", "core", "--all-steps", "--json")
    code, out, _ = run(*command)
    assert code == 0
    assert (root / TRACKER).read_text() == "20"
    hints = [json.loads(line)["report"]["load_hint"] for line in out.splitlines()]
    assert ["--ckpt-step 5 " in hints[0], "--ckpt-step 20 " in hints[1]] == [True, True]
    (root / TRACKER).write_text("5")  # by whomever: what is in place does not move it
    code, out, err = run(*command)
    assert outcomes(out) == {"checkpoint-5": "passed over", "checkpoint-20": "failed"}
    assert "iter_0000020: exists" in err
    (root / TRACKER).write_text("20")
    write_llama(a_run / "checkpoint-30")
    code, out, _ = run(*command)
    assert list(outcomes(out).values()) == ["passed over", "passed over", "converted"]
    assert (root / TRACKER).read_text() == "30"
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000005",
        "iter_0000020",
        "iter_0000030",
        TRACKER,
    ]
    # And back: iterations are steps, and one that the tracker does not name yet is not whole.
    (root / TRACKER).write_text("20")
    code, out, err = run("convert", root, tmp_path / "back", "--to", "hf", "--all-steps", "--json")
    assert code == 1
    assert list(outcomes(out).values()) == ["converted", "converted", "failed"]
    assert "iter_0000030: it is later than 20, which latest_checkpointed_iteration.txt" in err


def test_a_tracker_of_others_stays(a_run, tmp_path, run):
    shutil.rmtree(a_run / "checkpoint-10")
    shutil.rmtree(a_run / "checkpoint-100")
    root = tmp_path / "megatron"
    root.mkdir()
    (root / TRACKER).write_text("7000")
    command = ("convert", a_run, root, "--to", "core", "--all-steps", "--json")
    code, out, _ = run(*command)
    assert code == 0
    assert (root / TRACKER).read_text() == "7000"
    assert "stays as it is (7000)" in out


def test_what_is_no_run_is_said(a_run, tmp_path, run):
    step, out = a_run / "checkpoint-5", tmp_path / "out"
    cases = {
        (step, "--to", "hf", "--all-steps"): "holds no step (iter_N, ",
        (step, "--to", "hf", "--watch"): "holds no step yet; name their format with --from",
        (a_run, "--to", "core", "--all-steps", "--iteration", 5): "--iteration names one step",
        (a_run, "--to", "hf", "--watch", "0"): "'--watch'",
    }
    for (source, *options), said in cases.items():
        code, _, err = run("convert", source, out, *options)
        assert code in (1, 2)
        assert said in err
        assert not out.exists()


class Report:
    """What a conversion returns, as far as it is shown."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)


class Watched:
    """A run that is watched: what was converted, and what happens from one look to the next."""

    def __init__(self, source: Path, *happens) -> None:
        self.converted: list[str] = []
        self.happens = list(happens)
        job = ConversionRequest("hf", "hf", source, source.parent / "out")
        params = {"as_json": False, "quiet": True}
        self.runs = runs.Runs(job, params, self.convert, lambda *_: "")
        self.runs.wait = self.wait

    def convert(self, request: ConversionRequest) -> tuple[Report, str]:
        self.converted.append(request.source.name)
        return Report(request.target), ""

    def wait(self, seconds: float) -> None:
        if not seconds:
            return
        if not self.happens:
            raise Interrupted(signal.SIGTERM)
        self.happens.pop(0)()

    def until_stopped(self) -> list[str]:
        with pytest.raises(Interrupted):
            self.runs.watch(1.0)
        return self.converted


def nothing() -> None:
    """Let time pass."""


def test_a_step_is_taken_when_nothing_of_it_has_changed_between_two_looks(tmp_path):
    step = tmp_path / "run/step-1"
    step.mkdir(parents=True)

    def grow() -> None:
        with (step / "weights").open("a") as file:
            file.write("more")

    seen: list[list[str]] = []
    watched = Watched(tmp_path / "run")
    look = lambda: seen.append(list(watched.converted))  # noqa: E731 - as the others
    watched.happens = [grow, grow, look, look, nothing]
    assert watched.until_stopped() == ["step-1"]
    assert seen == [[], ["step-1"]]


def test_steps_are_taken_as_they_appear_each_once(tmp_path):
    root = tmp_path / "run"
    root.mkdir()

    def appear(number: int):
        return lambda: (root / f"step-{number}").mkdir()

    watched = Watched(root, appear(2), nothing, appear(1), appear(10), *[nothing] * 3)
    assert watched.until_stopped() == ["step-2", "step-1", "step-10"]


def test_a_step_that_fails_is_tried_again_when_it_changes(tmp_path, capsys):
    step = tmp_path / "run/step-1"
    step.mkdir(parents=True)
    tries: list[bool] = []

    def convert(request: ConversionRequest) -> tuple[Report, str]:
        tries.append((step / "rank-1").exists())
        return Report(request.target), "" if tries[-1] else "rank 1 is missing"

    watched = Watched(tmp_path / "run", *[nothing] * 3, lambda: (step / "rank-1").touch())
    watched.happens += [nothing] * 3
    watched.runs.convert = convert
    watched.until_stopped()
    assert tries == [False, True]
    assert capsys.readouterr().err == "error: step-1: rank 1 is missing\n"
    assert watched.runs.summary() == "1 step: 1 converted"


def test_a_step_that_was_cut_short_is_tried_at_the_next_look(tmp_path, capsys):
    (tmp_path / "run/step-1").mkdir(parents=True)
    tries: list[int] = []

    def convert(request: ConversionRequest) -> tuple[Report, str]:
        tries.append(1)
        if len(tries) < 3:
            raise CutShortError("the disk is full")
        return Report(request.target), ""

    watched = Watched(tmp_path / "run", *[nothing] * 5)
    watched.runs.convert = convert
    watched.until_stopped()
    assert len(tries) == 3
    assert capsys.readouterr().err == "error: step-1: the disk is full\n" * 2
    assert watched.runs.summary() == "1 step: 1 converted"


def test_megatron_s_tracker_and_deepspeed_s_latest_say_what_is_whole(tmp_path):
    for name, kind, said in (
        (TRACKER, "iter_00000{:02d}", "{}"),
        (TRACKER, "global_step_{}", "{}"),
        ("latest", "global_step{}", "global_step{}"),
    ):
        root = tmp_path / kind
        for number in (10, 20):
            (root / kind.format(number)).mkdir(parents=True)
        first, second = steps(root)
        alone = still_written(root, first)
        assert bool(alone) == kind.startswith("iter_")  # Megatron has always had a tracker
        assert not later_than_named(root, first)
        (root / name).write_text(said.format(10))
        assert not still_written(root, first)
        assert f"later than {said.format(10)}, which {name} names" in still_written(root, second)
        (root / name).write_text(said.format(20))
        assert not still_written(root, second)


def test_the_trainer_s_state_is_its_last_file(tmp_path):
    step = tmp_path / "checkpoint-10"
    step.mkdir()
    (one,) = steps(tmp_path)
    assert not still_written(tmp_path, one)
    before = signature(one)
    (step / "training_args.bin").touch()
    assert "trainer_state.json" in still_written(tmp_path, one)
    assert signature(one) != before
    (step / "trainer_state.json").touch()
    assert not still_written(tmp_path, one)


def test_watching_ends_by_a_signal_with_its_code(a_run, tmp_path, run, monkeypatch):
    looks: list[float] = []

    def wait(interrupts, seconds: float) -> None:
        looks.append(seconds)
        if looks.count(7.0) == 3:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(runs, "_wait", wait)
    (a_run / "checkpoint-10/training_args.bin").touch()  # its Trainer is still at work
    command = ("convert", a_run, tmp_path / "out", "--to", "hf", "--watch", "7")
    code, out, err = run(*command)
    assert code == 128 + signal.SIGTERM
    assert err == "error: stopped by SIGTERM; 2 steps: 2 converted\n"
    assert "checkpoint-5:\nconverted hf -> hf" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-100",
        "checkpoint-5",
    ]
