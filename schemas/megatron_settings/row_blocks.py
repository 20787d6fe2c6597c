"""Gate and up rows of experts in blocks, one after the other: Megatron's GLU interleaving.

With ``moe_mlp_glu_interleave_size`` N, the first matrix of each expert holds in every rank N rows
of the gate, N of up, N of the gate, and so on. Names and shapes are those of gate and up in halves,
and so is what ``torch_dist`` makes of a rank's halves: what it calls a gate is the first half of a
rank's blocks. Shared experts have a setting of their own.

Source: NVIDIA/Megatron-LM megatron/core/transformer/moe/experts.py (_remove_glu_interleaving),
megatron/core/transformer/mlp.py (apply_swiglu_sharded_factory) @ core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.tensors.joins import concat, deinterleave
from ckptx.tensors.lazy import LazyTensor

_SHARED = "moe_shared_expert_glu_interleave_size"
SIZES = {
    "moe_mlp_glu_interleave_size": ("", "moe_grouped_gemm"),
    _SHARED: ("shared ", "use_grouped_gemm_for_shared_expert"),
}
"""The settings; what goes before the keys of a message, and the switch without which they idle."""


def notes(args: Mapping[str, Any]) -> list[str]:
    """Return what was done to the rows of experts."""
    return [
        f"{name} {args[name]}: rows of gate and up are put in halves, their usual order"
        for name in SIZES
        if args.get(name) and args.get("num_experts")
    ]


def in_halves(tensors: Mapping[str, LazyTensor], args: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors of a mixture's layer with all rows of the gate before all of up.

    Raises:
        SchemaError: the blocks do not divide the rows, or modules read no blocks although there is
            a setting.
    """
    found = dict(tensors)
    if "router weight" not in tensors:
        return found
    tp = args.get("tensor_model_parallel_size") or 1
    for name, (prefix, switch) in SIZES.items():
        size = args.get(name)
        gate, up = f"{prefix}mlp l0 weight W", f"{prefix}mlp l0 weight V"
        if not size or gate not in tensors:
            continue
        if not args.get(switch):
            raise SchemaError(
                f"{name} is {size} in args without {switch}, where Megatron's modules read no "
                f"blocks of rows; --accept-arg {name} takes the rows as they are"
            )
        ranks = tp if prefix else args.get("expert_tensor_parallel_size") or tp
        found[gate], found[up] = _halves(tensors[gate], tensors[up], size, ranks, name)
    return found


def _halves(
    first: LazyTensor, second: LazyTensor, size: int, ranks: int, name: str
) -> tuple[LazyTensor, LazyTensor]:
    """Return gate and up, [..., rows, columns], given the halves of what every rank holds."""
    axis = len(first.shape) - 2
    rows, odd = divmod(first.shape[axis], ranks)
    if odd or rows % size:
        raise SchemaError(
            f"{name} {size} does not divide {first.shape[axis]} rows on {ranks} ranks"
        )
    parts: list[list[LazyTensor]] = []
    for start in range(0, rows * ranks, rows):
        own = concat([half.narrow(axis, start, start + rows) for half in (first, second)], axis)
        parts.append(deinterleave(own, [rows, rows], rows // size, axis))
    gate, up = (concat(halves, axis) for halves in zip(*parts, strict=True))
    return gate, up
