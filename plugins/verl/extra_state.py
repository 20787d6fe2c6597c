"""The states that verl's FSDP workers save beside the shares: schedulers and random generators.

    extra_state_world_size_4_rank_0.pt      {"lr_scheduler": dict or None, "rng": {...}}

They become two files beside the model. ``extra_state_merged.pt`` is rank 0's state with one more
entry, ``ranks``: the states of all, by rank; random generators differ from rank to rank.
``lr_scheduler_state.json`` is rank 0's scheduler, which is the same everywhere.

Source: volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py, checkpoint_manager.py @
01ee5e0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptx.containers import torch_zip
from ckptx.containers.carried import as_json, carried, saved
from ckptx.errors import FormatError, listing
from ckptx.storage.location import Location

MERGED = "extra_state_merged.pt"
SCHEDULER = "lr_scheduler_state.json"
_LARGEST = 64 << 20  # bytes; a rank's state has about 20 kB


def name_of(world: int, rank: int) -> str:
    """Return the name of a rank's file."""
    return f"extra_state_world_size_{world}_rank_{rank}.pt"


def merged(directory: Location, world: int) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the files that hold the states of all ranks, and remarks.

    Raises:
        FormatError: a rank's file is missing or damaged, or holds what cannot be carried over.
    """
    paths = [directory / name_of(world, rank) for rank in range(world)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FormatError(
            f"{directory}: --extra-state was given, but {len(missing)} of {world} files are "
            f"missing: {listing(missing)}; copy them, or leave the option out"
        )
    size = sum(path.stat().st_size for path in paths)
    if size > _LARGEST:
        raise FormatError(
            f"{directory}: the extra states have {size} bytes, expected {_LARGEST} at most; leave "
            "--extra-state out"
        )
    states = [_state(path, number) for number, path in enumerate(paths)]
    _check_same_step(directory, world, states)
    value = {**states[0], "world_size": world, "ranks": states}
    files = {MERGED: saved(MERGED, value, [str(path) for path in paths])}
    if (scheduler := states[0].get("lr_scheduler")) is None:
        return files, (f"{SCHEDULER} is left out: no scheduler was saved",)
    try:
        text = json.dumps(as_json(scheduler), indent=2, sort_keys=True)
    except TypeError as error:
        return files, (f"{SCHEDULER} is left out: {error}; {MERGED} holds the scheduler",)
    return {**files, SCHEDULER: f"{text}\n".encode()}, ()


def _check_same_step(directory: Location, world: int, states: list[dict[str, Any]]) -> None:
    """Raise where ranks are not at the same place of their schedules, which all have."""
    schedules = [state.get("lr_scheduler") for state in states]
    steps = [one.get("last_epoch") if isinstance(one, Mapping) else None for one in schedules]
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise FormatError(
                f"{directory / name_of(world, rank)}: its scheduler is at step {step!r:.40}, that "
                f"of rank 0 at {steps[0]!r:.40}; the files are of different steps"
            )


def _state(path: Location, number: int) -> dict[str, Any]:
    value = torch_zip.read(path, number)
    if not isinstance(value, Mapping):
        raise FormatError(f"{path}: expected a dictionary, found {type(value).__name__}")
    found: dict[str, Any] = carried(dict(value), str(path))
    return found
