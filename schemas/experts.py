"""Mixtures of experts in ``config.json`` and in Megatron's ``args``, in both directions.

`FAMILIES` says how the config of each family spells a mixture; `ARGS` pairs Megatron's arguments
with the spec's attributes. The rest of config and args is in `hf` and `args`, which call this.

Routing is the same where ``norm_topk_prob`` is true and Megatron takes the softmax after the top-k
(``moe_router_pre_softmax`` false): a softmax over the chosen logits is a softmax over all of them,
divided by the sum of the chosen.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe}/
configuration_*.py and modeling_*.py @ v5.23.0; NVIDIA/Megatron-LM
megatron/core/transformer/moe/moe_utils.py, megatron/training/{arguments,checkpointing}.py @
core_v0.16.1.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptx.errors import SchemaError
from ckptx.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the config of a family spells its experts, and what it fixes without saying so."""

    defaults: Mapping[str, Any]
    count: str = "num_experts"
    ffn: str = "moe_intermediate_size"
    """The key of the experts' ffn size; ``intermediate_size`` where no layer is dense."""
    spellings: tuple[str, ...] = ()
    """Other keys for ``count``, which are written too."""
    shared: bool = False
    """Whether there is a shared expert, with a gate."""
    normalized: bool = False
    """Whether the chosen probabilities always add up to one; else ``norm_topk_prob`` says."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of which one value alone is known, with that value."""

    @property
    def sparse(self) -> bool:
        """Whether the config can say that some layers are dense."""
        return "decoder_sparse_step" in self.defaults


_QWEN = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
FAMILIES: Mapping[str, Mixture] = {
    "mixtral": Mixture(
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        count="num_local_experts",
        ffn="intermediate_size",
        spellings=("num_experts",),
        normalized=True,
    ),
    "qwen2_moe": Mixture(
        _QWEN
        | {
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        shared=True,
        only={"qkv_bias": True},
    ),
    "qwen3_moe": Mixture(
        _QWEN | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        spellings=("num_local_experts",),
    ),
    "olmoe": Mixture(
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        ffn="intermediate_size",
        spellings=("num_local_experts",),
    ),
}
"""By family; the others have no experts."""

ARGS = (
    ("num_experts", "num_experts"),
    ("moe_ffn_hidden_size", "moe_ffn_hidden_size"),
    ("moe_router_topk", "moe_router_topk"),
    ("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    ("moe_shared_expert_gate", "moe_shared_expert_gate"),
    ("moe_router_score_function", "moe_router_score_function"),
    ("moe_router_pre_softmax", "moe_router_pre_softmax"),
    ("moe_router_enable_expert_bias", "moe_router_enable_expert_bias"),
    ("moe_router_num_groups", "moe_router_num_groups"),
    ("moe_router_group_topk", "moe_router_group_topk"),
    ("moe_router_topk_scaling_factor", "moe_router_topk_scaling_factor"),
)
"""Pairs of an argument and the spec's attribute."""

_BALANCING = "moe_router_load_balancing_type"
_MAX_LAYERS = 1 << 16


def prepared(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return a config with the keys of its mixture completed, and windows spelt out.

    Raises:
        SchemaError: a key has a value that the family is not known with.
    """
    mixture = FAMILIES.get(family)
    if mixture is None:
        return dict(values)
    found = {**mixture.defaults, **values}
    said = [key for key in (mixture.count, *mixture.spellings) if key in values]
    if len({values[key] for key in said}) > 1:
        raise SchemaError(f"{' and '.join(said)} contradict each other in the config")
    if said:
        found[mixture.count] = values[said[0]]
    for key, known in mixture.only.items():
        if found.get(key, known) != known:
            raise SchemaError(f"{key} is {found[key]!r}, family {family} is known with {known!r}")
    return found | _windows(found, family)


def from_config(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return the attributes of a spec that a config, once `prepared`, says of experts."""
    mixture = FAMILIES.get(family)
    if mixture is None:
        return {}
    count, per_token = values[mixture.count], values["num_experts_per_tok"]
    if not isinstance(count, int) or not isinstance(per_token, int) or not 0 < per_token <= count:
        raise SchemaError(
            f"num_experts_per_tok {per_token!r} of {mixture.count} {count!r}: not a mixture"
        )
    shared: dict[str, Any] = {}
    if mixture.shared:
        size = values["shared_expert_intermediate_size"]
        shared = {"moe_shared_expert_intermediate_size": size, "moe_shared_expert_gate": True}
    return {
        "num_experts": count,
        "moe_ffn_hidden_size": values[mixture.ffn],
        "moe_router_topk": per_token,
        "moe_router_pre_softmax": not (mixture.normalized or bool(values["norm_topk_prob"])),
        "moe_layers": _layers_from_config(values) if mixture.sparse else (),
        **shared,
    }


def to_config(spec: ModelSpec, family: str | None = None) -> dict[str, Any]:
    """Return the keys that the config of a family has for its experts."""
    mixture = FAMILIES.get(family or spec.family)
    if mixture is None:
        return {}
    dense = [layer for layer in range(spec.num_layers) if not spec.is_moe(layer)]
    said: dict[str, Any] = dict.fromkeys((mixture.count, *mixture.spellings), spec.num_experts)
    said |= {"num_experts_per_tok": spec.moe_router_topk, mixture.ffn: spec.moe_ffn_hidden_size}
    if not mixture.normalized:
        said["norm_topk_prob"] = not spec.moe_router_pre_softmax
    if mixture.sparse:
        said |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if mixture.shared:
        said["shared_expert_intermediate_size"] = spec.moe_shared_expert_intermediate_size
    if spec.family == "qwen3_moe":
        said["use_sliding_window"] = spec.extra.get("sliding_window") is not None
    return {**mixture.only, **said}


def compared(spec: ModelSpec, family: str) -> dict[str, Any]:
    """Return what of two specs can be compared, by the keys of a family's config."""
    mixture = FAMILIES.get(family)
    if mixture is None:
        return {}
    said = to_config(spec, family)
    return {key: said[key] for key in said if key not in {*mixture.spellings, *mixture.only}}


def respelled(keys: set[str], spec: ModelSpec) -> dict[str, Any]:
    """Return the entries of a config that must change where some of its `compared` keys do."""
    mixture = FAMILIES.get(spec.family)
    if mixture is None:
        return {}
    own = to_config(spec)
    if mixture.count in keys:
        keys = {*keys, *mixture.spellings}
    if "mlp_only_layers" in keys:
        keys = {*keys, "decoder_sparse_step"}
    return {key: own[key] for key in own if key in keys}


def unheld(spec: ModelSpec, family: str) -> list[str]:
    """Return what a spec says of experts that the config of a family cannot say."""
    mixture = FAMILIES.get(family)
    if mixture is None or not spec.num_experts:
        fits = (mixture is None) == (not spec.num_experts)
        return [] if fits else ["experts" if mixture is None else "no experts"]
    whole = all(spec.is_moe(layer) for layer in range(spec.num_layers))
    shared = bool(spec.moe_shared_expert_intermediate_size)
    own_size = spec.moe_ffn_hidden_size != spec.ffn_hidden_size
    score = spec.moe_router_score_function
    held = (
        (mixture.sparse or whole, "dense layers between mixtures"),
        (mixture.ffn != "intermediate_size" or not own_size, "experts of a size of their own"),
        (shared == mixture.shared, "a shared expert" if shared else "no shared expert"),
        (shared == spec.moe_shared_expert_gate, "a shared expert without a gate"),
        (
            not (mixture.normalized and spec.moe_router_pre_softmax),
            "probabilities that do not add up to one",
        ),
        (score == "softmax", f"{score} scores"),
        (not spec.moe_router_enable_expert_bias, "expert biases"),
        (not spec.moe_router_group_topk, "groups of experts"),
        (spec.moe_router_topk_scaling_factor in (None, 1.0), "scaled probabilities"),
        (not spec.extra.get(_BALANCING), f"{spec.extra.get(_BALANCING)} routing"),
    )
    return [reason for fits, reason in held if not fits]


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the entries of Megatron's ``args`` for a mixture, none for another model."""
    if not spec.num_experts:
        return {}
    frequency = [int(moe) for moe in spec.moe_layers] or 1
    said = {name: getattr(spec, attribute) for name, attribute in ARGS}
    return {**said, "moe_layer_freq": frequency}


def from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a spec that Megatron's ``args`` say of experts.

    Raises:
        SchemaError: the pattern of layers cannot be read.
    """
    if not args.get("num_experts"):
        return {}
    found = {attribute: args[name] for name, attribute in ARGS if args.get(name) is not None}
    found.setdefault("moe_ffn_hidden_size", args["ffn_hidden_size"])
    layers = layer_pattern(args.get("moe_layer_freq") or 1, args["num_layers"])
    return {**found, "moe_layers": layers}


def foreign(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``extra`` for routing that no config can say."""
    kind = args.get(_BALANCING)
    return {_BALANCING: kind} if args.get("num_experts") and kind == "sinkhorn" else {}


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


def inexpressible(spec: ModelSpec) -> list[str]:
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


def _layers_from_config(values: Mapping[str, Any]) -> tuple[bool, ...]:
    step, dense = values["decoder_sparse_step"] or 1, values["mlp_only_layers"] or ()
    found = tuple(
        (layer + 1) % step == 0 and layer not in dense
        for layer in range(values["num_hidden_layers"])
    )
    return () if all(found) else found


def _windows(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return sliding windows in the spelling that `hf` reads."""
    if family == "qwen3_moe" and not values.get("use_sliding_window"):
        return {"sliding_window": None}
    if family != "qwen2_moe" or not values.get("use_sliding_window") or values.get("layer_types"):
        return {}
    inside = (
        layer % 2 == 0 and layer < values["max_window_layers"]
        for layer in range(values["num_hidden_layers"])
    )
    return {"layer_types": ["sliding_attention" if one else "full_attention" for one in inside]}


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
