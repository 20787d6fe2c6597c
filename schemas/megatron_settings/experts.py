"""Mixtures of experts in Megatron's ``args``, in both directions.

`FIELDS` are the arguments that a spec has, too. The rest of the args is in `args`,
which calls this; how configs spell mixtures is in `ckptx.schemas.config.experts`.

Source: NVIDIA/Megatron-LM megatron/core/transformer/moe/moe_utils.py,
megatron/training/{arguments,checkpointing}.py @ core_v0.16.1.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.experts import BALANCING

_SAME_NAMES = """
    num_experts moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size
    moe_shared_expert_gate moe_router_score_function moe_router_pre_softmax
    moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk
    moe_router_topk_scaling_factor
"""
FIELDS = _SAME_NAMES.split()
"""Arguments that the spec has under the same names."""

_LOSSES = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}
"""Ways to balance experts that act in training alone; others choose experts otherwise."""
_MAX_LAYERS = 1 << 16


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the entries of Megatron's ``args`` for a mixture, none for another model."""
    if not spec.num_experts:
        return {}
    frequency = [int(moe) for moe in spec.moe_layers] or 1
    said = {name: getattr(spec, name) for name in FIELDS}
    return {**said, "moe_layer_freq": frequency}


def with_gate_of_files(args: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return args with the gate of the shared expert, which tensors prove and args seldom say.

    Raises:
        SchemaError: args say it, and there is no such tensor, or the other way round.
    """
    switch, tensor = "moe_shared_expert_gate", "shared_experts.gate_weight"
    held = any(name.endswith(tensor) for name in names)
    said = args.get(switch)
    if said is None or not args.get("moe_shared_expert_intermediate_size"):
        return {**args, **({switch: True} if held else {})}
    if bool(said) != held:
        raise SchemaError(
            f"args say {switch} {said}, and the files hold {'a' if held else 'no'} {tensor}; "
            f"--accept-arg {switch} goes by the files"
        )
    return dict(args)


def from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a spec that Megatron's ``args`` say of experts.

    Raises:
        SchemaError: the pattern of layers cannot be read.
    """
    if not args.get("num_experts"):
        return {}
    found = {name: args[name] for name in FIELDS if args.get(name) is not None}
    found.setdefault("moe_ffn_hidden_size", args["ffn_hidden_size"])
    layers = layer_pattern(args.get("moe_layer_freq") or 1, args["num_layers"])
    return {**found, "moe_layers": layers}


def megatron_only(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``extra`` for routing that no config can say."""
    kind = args.get(BALANCING)
    kinds = set(kind) if isinstance(kind, list | tuple) else {kind or "none"}
    return {BALANCING: kind} if args.get("num_experts") and not kinds <= _LOSSES else {}


def layer_pattern(frequency: Any, num_layers: int) -> tuple[bool, ...]:
    """Return which layers are mixtures, empty for all of them.

    ``frequency`` is ``moe_layer_freq``: every how many layers one is a mixture, the first being
    one; or a list, or the text of a list, as Megatron's command line takes it. A list that says
    "all" is not the same as 1: with it, ``torch_dist`` has keys per layer.

    Raises:
        SchemaError: it is none of these, or of another number of layers.

    Examples:
        >>> layer_pattern("([0]*1+[1]*2)", 3), layer_pattern(2, 3), layer_pattern(1, 3)
        ((False, True, True), (True, False, True), ())
    """
    read = _evaluated(frequency) if isinstance(frequency, str) else frequency
    if isinstance(read, int) and read > 0:
        return tuple(layer % read == 0 for layer in range(num_layers)) if read > 1 else ()
    if not isinstance(read, list | tuple) or any(one not in (0, 1) for one in read):
        raise SchemaError(f"moe_layer_freq {frequency!r} is no number and no list of 0 and 1")
    if len(read) != num_layers:
        raise SchemaError(f"moe_layer_freq has {len(read)} entries for {num_layers} layers")
    return tuple(bool(one) for one in read)


def unsupported_by_megatron(spec: ModelSpec) -> list[str]:
    """Return what Megatron cannot compute of a mixture, one reason each."""
    post_softmax = spec.moe_router_score_function == "softmax" and not spec.moe_router_pre_softmax
    if spec.num_experts and spec.moe_router_topk == 1 and post_softmax:
        return [
            f"{spec.architecture} with one expert per token and normalised probabilities: Megatron "
            "refuses a softmax over one expert"
        ]
    return []


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options for experts that ``--use-checkpoint-args`` does not restore."""
    flags = ["--moe-shared-expert-gate"] if spec.moe_shared_expert_gate else []
    if spec.moe_router_group_topk:
        flags += ["--moe-router-num-groups", str(spec.moe_router_num_groups)]
        flags += ["--moe-router-group-topk", str(spec.moe_router_group_topk)]
    return flags


def _evaluated(text: str) -> int | list[int]:
    """Return the number or list that a text spells with ``+``, ``*`` and brackets only."""
    try:
        read: int | list[int] = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise SchemaError(f"moe_layer_freq {text!r} cannot be read: {error}") from error
    return read


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=entries):
            return [_value(entry) for entry in entries]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = [_value(left), _value(right)]
            counts = [one if isinstance(one, int) else len(one) for one in factors]
            if counts[0] * counts[1] > _MAX_LAYERS:
                raise ValueError("it is too long")
            return factors[0] * factors[1]
    raise ValueError("it is no list of numbers")
