"""Whether the files of a checkpoint belong together, as far as a few reads can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptx.errors import FormatError
from ckptx.plugins.deepspeed.directory import Checkpoint
from ckptx.storage.blocks import equal
from ckptx.tensors.lazy import LazyTensor, Stored

SAMPLE = 4096
"""Elements at one place of a tensor of which master and module are compared."""


def check_against_module(
    checkpoint: Checkpoint, masters: Mapping[str, LazyTensor], module: Mapping[str, LazyTensor]
) -> None:
    """Raise unless the masters, rounded, are the module's weights: then all ranks are of one save.

    Both ends of every tensor are compared, and so many places between them that every rank's piece
    has one: that shows files of another run or step, and wrong order. Buffers and frozen weights
    have no master.
    """
    total = sum(master.numel for master in masters.values())
    ranks = max(1, len(checkpoint.optimizers))
    files = [str(path) for path in checkpoint.files]
    for name, master in masters.items():
        if (own := module.get(name)) is None:
            continue
        if own.shape != master.shape:
            raise FormatError(
                f"{checkpoint.directory}: {name!r} is {list(own.shape)} in the module and "
                f"{list(master.shape)} in param_shapes"
            )
        # A rank has about total / ranks elements, so that half of that is a step into each.
        places = 2 * -(-master.numel * ranks // max(1, total)) + 1
        if not same_ends(master, own, files, places):
            raise FormatError(
                f"{checkpoint.directory}: {name!r}: the fp32 master in the optimizer's files, "
                f"rounded to {own.dtype}, is not the weight in the module; the files are not of "
                "one save. Find the right ones, or take the module's weights with --weights module"
            )


def same_ends(master: LazyTensor, own: LazyTensor, files: Sequence[str], places: int = 2) -> bool:
    """Return whether a master, rounded, is a weight of the module, as far as its ends show.

    Of ``places`` above two the others lie between the ends, evenly.
    """
    if master.shape != own.shape:
        return False
    size = min(master.numel, SAMPLE)
    steps = max(1, places - 1)
    starts = sorted({(master.numel - size) * step // steps for step in range(steps + 1)})
    ranges = [(start, start + size) for start in starts]
    return equal(master.cast(own.dtype), own, files, lambda tensor: ranges)


def check_steps(checkpoint: Checkpoint) -> None:
    """Raise unless the optimizers of all ranks have made as many steps.

    ZeRO 3 leaves nothing else that could be compared.
    """
    files = [str(path) for path in checkpoint.files]
    first, *others = [_steps(state) for state in checkpoint.optimizers]
    for rank, steps in enumerate(others, 1):
        same = len(steps) == len(first) and all(
            equal(one, other, files)
            if isinstance(one, Stored) and isinstance(other, Stored)
            else one == other
            for one, other in zip(first, steps, strict=True)
        )
        if not same:
            raise FormatError(
                f"{checkpoint.directory}: the optimizers of ranks 0 and {rank} have not made as "
                "many steps; the files are not of one checkpoint"
            )


def _steps(state: Any) -> list[Any]:
    """Return the counts of steps in an optimizer's state."""
    found = []
    for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
        if key == "step":
            found.append(value)
        elif isinstance(value, Mapping | list):
            found += _steps(value)
    return found
