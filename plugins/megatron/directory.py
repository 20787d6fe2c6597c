"""Megatron's checkpoint directories: a root with a tracker file, iterations below it.

    ROOT/latest_checkpointed_iteration.txt      "10" or "release"
    ROOT/iter_0000010/                          or ROOT/release/
        metadata.json, .metadata, common.pt, __0_0.distcp, ...      torch_dist
        mp_rank_00_000/model_optim_rng.pt, ...                      torch

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py @ core_v0.16.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ckptx.errors import FormatError, PlanError
from ckptx.plugins.megatron.writers.bridge import LATEST, step
from ckptx.plugins.megatron.writers.nemo import weights_of
from ckptx.plugins.run_directory import TRACKER, tracked
from ckptx.storage.location import Location

SIDECARS = "huggingface"
"""The folder, inside an iteration, of a model's config and tokenizer."""
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")

Iteration: TypeAlias = int | str
"""A number, or ``"release"``."""


@dataclass(frozen=True, slots=True)
class IterationDirectory:
    """One checkpoint: its directory, which iteration it is, how it is stored."""

    path: Location
    iteration: Iteration
    format: str
    """``"torch_dist"``, ``"torch"``, or ``"deepspeed"``: a file per rank, by Megatron-DeepSpeed."""


def iteration_name(iteration: Iteration) -> str:
    """Return the directory name of an iteration.

    Examples:
        >>> iteration_name(10), iteration_name("release")
        ('iter_0000010', 'release')
    """
    return "release" if iteration == "release" else f"iter_{int(iteration):07d}"


def parse_iteration(text: str) -> Iteration:
    """Return the iteration that a tracker file or a user names.

    Raises:
        PlanError: it is neither a number nor ``release``.
    """
    text = text.strip()
    if text == "release":
        return text
    if text.isdigit():
        return int(text)
    raise PlanError(f"{text!r} is no iteration; expected a number or 'release'")


def looks_like(source: Location) -> bool:
    """Return whether ``source`` is a Megatron root or an iteration directory."""
    if not source.is_dir():
        return False
    if _tracker(source):
        return not any(source.glob("global_step_*"))  # verl's roots have such a tracker, too
    return _format(weights_of(source)) not in (None, "fsdp_dtensor")


def _tracker(source: Location) -> Location | None:
    """Return the file that names an iteration of a root; Bridge's first releases have their own."""
    return next((source / name for name in (TRACKER, LATEST) if (source / name).is_file()), None)


def find(source: Location) -> IterationDirectory:
    """Return the checkpoint that ``source``, a root or an iteration directory, means.

    Raises:
        FormatError: there is none, or it is incomplete.
    """
    directory = weights_of(source)
    if tracker := _tracker(source):
        try:
            bridges = tracker.name == LATEST
            iteration = step(tracker) if bridges else parse_iteration(tracked(tracker))
        except PlanError as error:
            raise FormatError(f"{tracker}: {error}") from error
        directory = source / iteration_name(iteration)
        if not directory.is_dir():
            raise FormatError(
                f"{tracker}: points to {directory.name}, which is not there; correct the tracker "
                "or give the iteration directory itself"
            )
    else:
        iteration = _iteration_of(directory)
    stored = _format(directory)
    if stored is None and any(directory.glob("mp_rank_*_model_states.pt")):
        stored = "deepspeed"
    if stored is None:
        raise FormatError(
            f"{directory}: neither metadata.json nor mp_rank_* is there; not a Megatron "
            "checkpoint, or one whose saving was interrupted"
        )
    if stored == "fsdp_dtensor":
        raise FormatError(
            f"{directory}: .metadata without metadata.json: a PyTorch DCP or Megatron-FSDP "
            "checkpoint (fsdp_dtensor); the first is for --loader dcp, the second is not loaded yet"
        )
    return IterationDirectory(directory, iteration, stored)


def unfinished(source: Location) -> tuple[str, ...]:
    """Return remarks on iterations of a root that are later than what its tracker file names.

    Megatron writes the tracker last, so a save may have been interrupted.
    """
    tracker = source / TRACKER
    if not tracker.is_file():
        return ()
    named = tracked(tracker)
    later = sorted(
        path.name
        for path in source.glob("iter_*")
        if named.isdecimal()
        and path.name.removeprefix("iter_").isdecimal()
        and int(path.name.removeprefix("iter_")) > int(named)
    )
    return tuple(
        f"{name} is later than iteration {named}, which {TRACKER} names and which was read: "
        "was its save interrupted?"
        for name in later
    )


def _iteration_of(directory: Location) -> Iteration:
    number = directory.name.removeprefix("iter_").removeprefix("global_step")
    return int(number) if number.isdigit() else "release"


def _format(directory: Location) -> str | None:
    if (directory / "metadata.json").is_file():
        return "torch_dist"
    if any(path.is_dir() for path in directory.glob("mp_rank_*")):  # DeepSpeed has files so named
        return "torch"
    if (directory / ".metadata").is_file():
        return "fsdp_dtensor"
    return None
