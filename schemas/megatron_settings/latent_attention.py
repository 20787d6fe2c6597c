"""Multi-latent attention and multi-token prediction in Megatron's ``args``, in both directions.

The rest of the args is in `ckptx.schemas.megatron_settings.args`, which calls this.

Source: NVIDIA/Megatron-LM megatron/core/transformer/{transformer_config,multi_latent_attention,
multi_token_prediction}.py, megatron/training/{arguments,checkpointing}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.schemas.megatron_settings.settings import known

_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
ARGS = {name: name for name in ("multi_latent_attention", *_SIZES)} | {"v_head_dim": "kv_channels"}
"""Arguments and the spec's attributes."""

LATENT_EPSILON = 1e-6
"""Of the norms of latent vectors in transformers, whose class has it as its default.

Source: huggingface/transformers src/transformers/models/deepseek_v3/modeling_deepseek_v3.py @
v5.23.0.
"""

YARN = (
    ("rotary_scaling_factor", "factor", 1.0),
    ("original_max_position_embeddings", "original_max_position_embeddings", 4096),
    ("beta_fast", "beta_fast", 32.0),
    ("beta_slow", "beta_slow", 1.0),
    ("mscale", "mscale", 1.0),
    ("mscale_all_dim", "mscale_all_dim", 0.0),
)
"""An argument, the key of ``rope_scaling`` and what either is where it is not said."""


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the entries of Megatron's ``args`` for latent attention and further tokens."""
    further = {"mtp_num_layers": spec.mtp_num_layers or None}
    if not spec.multi_latent_attention:
        return {"multi_latent_attention": False, **further}
    said = {name: getattr(spec, attribute) for name, attribute in ARGS.items()}
    return {**said, **further, **_scaling_to_args(spec.rotary_scaling)}


def from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a spec that Megatron's ``args`` say of either.

    Raises:
        SchemaError: a size of latent attention is missing.
    """
    further = {"mtp_num_layers": args.get("mtp_num_layers") or 0}
    if not args.get("multi_latent_attention"):
        return further
    missing = [name for name in ARGS if args.get(name) is None and name != "q_lora_rank"]
    if missing:
        raise SchemaError(
            f"multi_latent_attention is set in the checkpoint's args, which do not say "
            f"{', '.join(missing)}; give the model's config with --hf-base"
        )
    return {**further, **{attribute: args.get(name) for name, attribute in ARGS.items()}}


def scaling_from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling of the rotary embedding that latent attention has by ``args``.

    Megatron's own default is YaRN, which a factor of 1 leaves without effect.
    """
    said = {
        key: args.get(name) if args.get(name) is not None else plain for name, key, plain in YARN
    }
    if (args.get("rope_type") or "yarn") != "yarn" or said["factor"] == 1.0:
        return None
    return {"rope_type": "yarn", **said}


def is_exact(spec: ModelSpec) -> bool:
    """Return whether ``args`` say the scaling of latent attention as it is."""
    return spec.rotary_scaling == scaling_from_args(_scaling_to_args(spec.rotary_scaling))


def unsupported_by_megatron(spec: ModelSpec) -> Iterator[str]:
    """Yield what Megatron cannot compute of a model with latent attention."""
    if not spec.multi_latent_attention:
        return
    if spec.extra.get("rope_interleave") is False:
        yield (
            f"{spec.architecture} with rope_interleave=false: Megatron's latent attention rotates "
            "neighbouring channels"
        )
    if spec.add_bias_linear or spec.add_qkv_bias or spec.extra.get("attention_out_bias"):
        yield (
            f"{spec.architecture} with biases in attention: Megatron's latent attention has none "
            "before its output projection"
        )


def notes(spec: ModelSpec) -> Iterator[str]:
    """Yield what Megatron computes otherwise although all weights are there."""
    if spec.multi_latent_attention and spec.norm_epsilon != LATENT_EPSILON:
        yield (
            f"rms_norm_eps {spec.norm_epsilon:g}: transformers norms latent vectors with "
            f"{LATENT_EPSILON:g} all the same, Megatron with {spec.norm_epsilon:g}"
        )
    scaling = spec.rotary_scaling
    if spec.multi_latent_attention and scaling is not None:
        unsaid = ", ".join(
            f"{name}={value}"
            for name, value in _scaling_to_args(scaling).items()
            if not known()[name].is_argument and value != known()[name].default
        )
        if unsaid:
            yield (
                "Megatron's command line has no flags for all of rope_scaling; build "
                f"MLATransformerConfig with {unsaid}"
            )
        kind = scaling["rope_type"]
        if kind != "yarn":
            yield (
                f"rope_scaling {dict(scaling)}: Megatron's latent attention has no {kind} scaling "
                "and runs without; the setting is kept for the way back"
            )
        elif bool(scaling.get("mscale", 1.0)) != bool(scaling.get("mscale_all_dim")) and (
            "mscale" in scaling or "mscale_all_dim" in scaling
        ):
            yield (
                "rope_scaling has only one of mscale and mscale_all_dim: transformers ignores it "
                "in the rotary embedding, Megatron does not"
            )
    if spec.moe_router_group_topk:
        best = spec.moe_router_topk // spec.moe_router_group_topk
        theirs = 2 if spec.moe_router_score_function == "sigmoid" else 1
        if best != theirs:
            yield (
                f"{spec.architecture} ranks a group of experts by its best {theirs}, Megatron by "
                f"the sum of its best {best} (moe_router_topk over moe_router_group_topk): some "
                "tokens go to other experts"
            )


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options that ``--use-checkpoint-args`` does not restore."""
    flags = ["--mtp-num-layers", str(spec.mtp_num_layers)] if spec.mtp_num_layers else []
    if not spec.multi_latent_attention:
        return flags
    flags.append("--multi-latent-attention")
    for name, value in to_args(spec).items():
        is_size = value is not None and not isinstance(value, bool) and name != "mtp_num_layers"
        if is_size and known()[name].is_argument:
            flags += [
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            ]
    return flags


def _scaling_to_args(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if scaling is None or scaling["rope_type"] != "yarn":
        return {"rope_type": "rope"}
    return {"rope_type": "yarn", **{name: scaling.get(key, plain) for name, key, plain in YARN}}
