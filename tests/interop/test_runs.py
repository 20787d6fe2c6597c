"""Whole runs as their writers leave them: the Trainer of transformers, DeepSpeed's tags."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from ckptx.cli import runs
from ckptx.processes.interrupts import Interrupted

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from safetensors.torch import load_file
from transformers.trainer_callback import ExportableState

from tests.formats import zero_by_hand
from tests.oracles import hf

FIRST, SECOND = "checkpoint-1", "checkpoint-2"


class Watcher(transformers.TrainerCallback, ExportableState):
    """Keeps a copy of a checkpoint at the moment before its last file is written."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.before: list[str] = []

    def state(self) -> dict:
        """Be asked by the Trainer for what it puts into its last file."""
        for step in sorted(self.place.glob("checkpoint-*")):
            self.before = sorted(path.name for path in step.iterdir())
        return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Watcher]:
    """Return what the real Trainer leaves after two steps."""
    place = tmp_path_factory.mktemp("trained")
    hf.llama(place / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    watcher = Watcher(place / "run")
    arguments = transformers.TrainingArguments(
        output_dir=str(place / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[watcher]).train()
    return place / "run", watcher


def test_every_checkpoint_of_the_trainer(trained, tmp_path, run):
    source, _ = trained
    code, out, err = run("convert", source, tmp_path / "out", "--to", "hf", "--all-steps")
    assert (code, err) == (0, "")
    assert out.endswith("2 steps: 2 converted\n")
    first, second = (
        load_file(tmp_path / "out" / step / "model.safetensors") for step in (FIRST, SECOND)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for step, found in ((FIRST, first), (SECOND, second)):
        written = transformers.AutoModelForCausalLM.from_pretrained(source / step).state_dict()
        for name, tensor in found.items():
            assert torch.equal(tensor, written[name])


def test_the_trainer_writes_its_state_last(trained, tmp_path, run, monkeypatch):
    source, watcher = trained
    last = sorted(path.name for path in (source / SECOND).iterdir())
    assert set(last) - set(watcher.before) == {"trainer_state.json"}
    assert {"training_args.bin", "optimizer.pt", "model.safetensors"} <= set(watcher.before)
    shutil.copytree(source, tmp_path / "run")
    state = tmp_path / "run" / SECOND / "trainer_state.json"
    kept = state.read_bytes()
    state.unlink()  # as a look at that moment finds it
    found: list[list[str]] = []

    def wait(_: object, seconds: float) -> None:
        if not seconds:
            return
        out = tmp_path / "out"
        found.append(sorted(path.name for path in out.iterdir()) if out.exists() else [])
        if len(found) == 3:
            state.write_bytes(kept)
        if len(found) == 5:
            raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(runs, "_wait", wait)
    command = ("convert", tmp_path / "run", tmp_path / "out", "--to", "hf", "--watch", "--quiet")
    assert run(*command)[0] == 128 + signal.SIGINT
    assert found == [[], [FIRST], [FIRST], [FIRST], [FIRST, SECOND]]


def test_every_tag_of_deepspeed(tmp_path, run):
    hf.llama(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for step in (20, 100):
        moved = {name: tensor + step for name, tensor in weights.items()}
        options = {"tag": f"global_step{step}", "step": step}
        zero_by_hand.write(tmp_path / "run", moved, 3, 2, **options)
    options = ("--to", "hf", "--hf-base", tmp_path / "base", "--all-steps", "--json")
    code, out, _ = run("convert", tmp_path / "run", tmp_path / "out", *options)
    assert code == 0
    assert [json.loads(line)["step"] for line in out.splitlines()] == [
        "global_step20",
        "global_step100",
    ]
    for step in (20, 100):
        found = load_file(tmp_path / "out" / f"global_step{step}" / "model.safetensors")
        assert all(torch.equal(found[name], weights[name] + step) for name in weights)
    (tmp_path / "run/latest").write_text("global_step20")  # the save of 100 has not come to its end
    code, out, err = run("convert", tmp_path / "run", tmp_path / "other", *options)
    assert code == 1
    assert "global_step100: it is later than global_step20, which latest names" in err
