"""Where a run keeps its checkpoints: steps, the tracker that names one, the files of all ranks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sized

import click

from ckptx.conversion.options import option
from ckptx.errors import FormatError, listing
from ckptx.storage.location import Location

TRACKER = "latest_checkpointed_iteration.txt"
"""Beside the steps of a run, with the number of the last; Megatron's, and that of trainers."""
GLOBAL_STEP = re.compile(r"global_step_(\d+)")
ACTOR = "actor"
"""The model that is trained, of those that a step holds."""


def actor_option() -> click.Option:
    """Return ``--actor-dir``."""
    about = "Folder of a step whose model is converted: actor or critic."
    return option("--actor-dir", str, about, ACTOR)


def tracked(tracker: Location) -> str:
    """Return what a tracker says, without the space around it."""
    return tracker.read_text(errors="replace").strip()


def names_in(directory: Location) -> list[str]:
    """Return the names of what a directory holds, sorted."""
    return sorted(path.name for path in directory.iterdir())


def step_of(place: Location, step: re.Pattern[str], above: int) -> int | str:
    """Return the number in the name of a directory, or of one of so many above it.

    It is ``"release"`` where no name is that of a ``step``.
    """
    whole = place.absolute()
    for directory in (whole, *whole.parents[:above]):
        if match := step.fullmatch(directory.name):
            return int(match[1])
    return "release"


def all_ranks(
    directory: Location, ranks: Mapping[int, Location], world: int, named: str, least: str = ""
) -> list[Location]:
    """Return the files of ranks 0 to ``world`` - 1; ``named`` is how they are called.

    Raises:
        FormatError: some are missing. Numbers are read from names of files: they may be any.
    """
    count = sum(rank < world for rank in ranks)
    if count < world:
        names = (named.format(rank) for rank in range(world) if rank not in ranks)
        raise FormatError(
            f"{directory}: {world - count} of {least}{world} rank files are missing: "
            f"{listing(itertools.islice(names, 3))}; copy them"
        )
    return [ranks[rank] for rank in range(world)]


def check_same_tensors(held: Mapping[str, Sized], count: int, file: Location) -> None:
    """Raise unless each tensor has come from all of ``count`` ranks, of which ``file`` is last."""
    if odd := [name for name, parts in held.items() if len(parts) != count]:
        raise FormatError(
            f"{file}: expected the tensors of the other ranks, found others or fewer, as by "
            f"{listing(odd, 2)}; the files are of different runs"
        )
