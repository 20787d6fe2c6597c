"""The steps of a training run, side by side in one directory, and which of them are whole.

    RUN/iter_0000010/, release/     Megatron            RUN/latest_checkpointed_iteration.txt
        global_step10/              DeepSpeed           RUN/latest
        global_step_10/             verl, RLinf         verl: RUN/latest_checkpointed_iteration.txt
        checkpoint-10/              Hugging Face's Trainer
        step-10/                    torchtitan

What names the last step is written when that step is whole, and the state of the Trainer is the
last file of a checkpoint. Of others the loader finds out what is missing.

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py, save_checkpoint @ core_v0.16.1;
deepspeedai/DeepSpeed deepspeed/runtime/engine.py, save_checkpoint @ v0.19.8; volcengine/verl
verl/trainer/ppo/ray_trainer.py, _save_checkpoint @ v0.7.0; huggingface/transformers
src/transformers/trainer.py, _save_checkpoint @ v5.0.0; pytorch/torchtitan
torchtitan/components/checkpoint.py @ v0.2.0.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ckptx.errors import PlanError

_STEP = re.compile(r"(?P<kind>iter_|global_step_?|checkpoint-|step-)(?P<number>\d+)|release")
_TRACKER = "latest_checkpointed_iteration.txt"
_POINTERS = (_TRACKER, "latest")
_KINDS = "iter_N, release, global_stepN, global_step_N, checkpoint-N, step-N"

Signature: TypeAlias = frozenset[tuple[str, int, int]]
"""Path, size and time of the last change of every file of a step."""


@dataclass(frozen=True, order=True)
class Step:
    """A step of a run; ``number`` is -1 for a release."""

    number: int
    name: str
    path: Path

    @property
    def iteration(self) -> str:
        """The step as Megatron names it."""
        return "release" if self.number < 0 else str(self.number)


def steps(run: Path) -> list[Step]:
    """Return the steps of a run, the first one first.

    Raises:
        PlanError: it is no directory.
    """
    try:
        names = os.listdir(run)  # noqa: PTH208 - names are all that is looked at
    except OSError as error:
        raise PlanError(f"{run}: cannot be listed: {error.strerror}") from error
    matches = [match for name in names if (match := _STEP.fullmatch(name))]
    found = (Step(int(one["number"] or -1), one[0], run / one[0]) for one in matches)
    return sorted(step for step in found if step.path.is_dir())


def first_step(run: Path) -> Step:
    """Return the first step of a run.

    Raises:
        PlanError: there is none.
    """
    if found := steps(run):
        return found[0]
    raise PlanError(f"{run}: holds no step ({_KINDS}); give the directory that holds the steps")


def later_than_named(run: Path, step: Step) -> str:
    """Return why a step is not whole by what the run says of its last one; empty if it may be."""
    for name in _POINTERS:
        try:
            said = (run / name).read_text(errors="replace").strip()
        except OSError:
            continue
        named = _STEP.fullmatch(said)
        last = named["number"] if named else said
        if last and last.isdecimal() and step.number > int(last):
            return (
                f"it is later than {said}, which {name} names: its save goes on, or was "
                "interrupted; to convert it nevertheless, give it alone"
            )
    return ""


def still_written(run: Path, step: Step) -> str:
    """Return why a step of a run that goes on may not be whole; empty if nothing says so."""
    if reason := later_than_named(run, step):
        return reason
    trackers = (_TRACKER, "latest_train_state.pt")
    if step.name.startswith("iter_") and not any((run / name).is_file() for name in trackers):
        return f"no {_TRACKER} is there, which Megatron writes last"
    trainers = (step.path / "training_args.bin").is_file()
    if trainers and not (step.path / "trainer_state.json").is_file():
        return "no trainer_state.json is there, which the Trainer writes last"
    return ""


def signature(step: Step) -> Signature:
    """Return what changes while a step is written."""
    found = set()
    for path in step.path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was a temporary one
            status = path.lstat()
            found.add((str(path), status.st_size, status.st_mtime_ns))
    return frozenset(found)
