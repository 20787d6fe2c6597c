"""DeepSpeed's own mixtures of experts: a file for each expert, masters in groups of their own.

Every expert-parallel rank has some of the experts, and numbers them from 0 in its optimizer. With
four data-parallel ranks and two expert-parallel ones the first two hold the first halves of their
masters, the others the second:

    data-parallel rank       0          1          2          3
    experts                  0, 1       2, 3       0, 1       2, 3
    partition_count 2        first      first      second     second

Source: deepspeedai/DeepSpeed deepspeed/utils/groups.py, deepspeed/runtime/engine.py
_save_moe_checkpoint, deepspeed/moe/utils.py @ v0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptx.errors import FormatError
from ckptx.plugins.deepspeed.directory import Checkpoint, Saved
from ckptx.plugins.deepspeed.weights import together

_NUMBER = re.compile(r"(?P<before>.*\.deepspeed_experts\.)(?P<number>\d+)(?P<after>\..*)")
_BY_GROUP = ("single_partition_of_fp32_groups", "param_alignment_paddings")


def with_module(saved: Saved) -> Checkpoint:
    """Return the checkpoint with the experts among the module's weights."""
    (found,) = saved.ranks
    model = {**found.model, "module": {**found.module, **saved.experts}}
    # The optimizers of all ranks are one: by their values it is known whose masters they hold.
    if one := together([entry.get("optimizer") for entry in saved.expert_optimizers]):
        model["optimizer"] = one
    return replace(found, models=[model])


def shares(saved: Saved) -> Iterator[Checkpoint]:
    """Yield what is not of experts, then what each expert-parallel rank has of them.

    Raises:
        FormatError: ranks do not divide into groups, or a group of parameters is of both kinds.
    """
    whole = with_module(saved)
    groups, everything = whole.model["param_shapes"], whole.module
    of_experts = [g for g, shapes in enumerate(groups) if any(map(_NUMBER.fullmatch, shapes))]
    dense = [g for g in range(len(groups)) if g not in of_experts]
    if any(not _NUMBER.fullmatch(name) for g in of_experts for name in groups[g]):
        raise FormatError(
            f"{saved.directory}: a group of parameters is of experts and others; DeepSpeed keeps "
            "them apart: the files are damaged, or of a version that is not known"
        )
    taken: dict[str, Any] = {}
    found = []
    for g in of_experts:
        for rank, (own, optimizers) in enumerate(_ranks(whole, g)):
            module = {name: everything[name] for name in own if name in everything}
            taken |= module
            model = {**whole.model, "param_shapes": [own], "module": module}
            model |= {"frozen_param_shapes": {}, "frozen_param_fragments": {}, "shared_params": {}}
            label, cut = f"group {g} of expert-parallel rank {rank}: ", _cut(optimizers, [g])
            found.append(replace(whole, models=[model], optimizers=cut, label=label))
    frozen = whole.model.get("frozen_param_shapes") or {}
    model = {
        **whole.model,
        "param_shapes": [groups[g] for g in dense],
        "module": {name: t for name, t in everything.items() if name not in taken},
        "frozen_param_shapes": {n: s for n, s in frozen.items() if not _NUMBER.fullmatch(n)},
    }
    yield replace(whole, models=[model], optimizers=_cut(whole.optimizers, dense))
    yield from found


def _ranks(
    whole: Checkpoint, group: int
) -> Iterator[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Yield the shapes of every expert-parallel rank's experts, and its optimizers in order."""
    states = whole.optimizers
    partitions = states[0]["optimizer_state_dict"].get("partition_count")
    count = partitions[group] if isinstance(partitions, list) and group < len(partitions) else 0
    if type(count) is not int or count < 1 or len(states) % count:
        raise FormatError(
            f"{whole.directory}: {len(states)} ranks do not divide into {count} partitions of "
            "experts; the files are not of one checkpoint"
        )
    parallel = len(states) // count
    shapes = whole.model["param_shapes"][group]
    numbers: dict[str, set[str]] = {}
    for match in filter(None, map(_NUMBER.fullmatch, whole.module)):
        numbers.setdefault(match["before"], set()).add(match["number"])
    local = {before: len(found) // parallel for before, found in numbers.items()}
    for rank in range(parallel):
        own = {}
        for name, shape in shapes.items():
            parts = _NUMBER.fullmatch(name)
            assert parts is not None  # no other names are in a group of experts
            number = int(parts["number"]) + rank * local.get(parts["before"], 0)
            own[f"{parts['before']}{number}{parts['after']}"] = shape
        yield own, [states[dp] for dp in range(rank, len(states), parallel)]


def _cut(optimizers: Sequence[Mapping[str, Any]], groups: Sequence[int]) -> list[Mapping[str, Any]]:
    """Return the optimizers of the ranks with some of their groups."""
    cut: list[Mapping[str, Any]] = []
    for state in optimizers:
        own = dict(state["optimizer_state_dict"])
        for key in _BY_GROUP:
            value = own.get(key)
            if isinstance(value, list) and len(value) > max(groups, default=0):
                own[key] = [value[g] for g in groups]
        cut.append({**state, "optimizer_state_dict": own})
    return cut
