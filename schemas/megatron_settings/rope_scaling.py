"""Scaling of rotary embeddings in Megatron's ``args``, in both directions.

That of multi-latent attention is in `ckptx.schemas.megatron_settings.latent_attention`.

Source: NVIDIA/Megatron-LM megatron/core/models/common/embeddings/rotary_pos_embedding.py,
megatron/training/arguments.py, gpt_builders.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.model.spec import ModelSpec

LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What `RotaryEmbedding._apply_scaling` has fixed: only the factor is a parameter there."""
BUILDER_FACTOR = 8.0
"""The factor that models get: gpt_builders.py up to core 0.19 does not pass on that of args."""


def from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling that args mean, as ``rope_scaling`` of a config; None without any."""
    if args.get("use_rope_scaling"):
        factor = args.get("rope_scaling_factor") or BUILDER_FACTOR
        return {"rope_type": "llama3", "factor": float(factor), **LLAMA3_CONSTANTS}
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": float(factor)}
    return None


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments that say a spec's scaling, as far as they can."""
    scaling = spec.rotary_scaling or {}
    return {
        "use_rope_scaling": _is_llama3(spec),
        "rope_scaling_factor": _factor(spec),
        "rotary_seq_len_interpolation_factor": (
            int(scaling["factor"]) if _is_whole_linear(spec) else None
        ),
    }


def is_exact(spec: ModelSpec) -> bool:
    """Whether the arguments, as Megatron reads them, say Llama 3's scaling and no other."""
    said = {"use_rope_scaling": _is_llama3(spec), "rope_scaling_factor": _factor(spec)}
    return spec.rotary_scaling == from_args(said)


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options for what Megatron does not take from a checkpoint."""
    if _is_llama3(spec):
        return ["--use-rope-scaling", "--rope-scaling-factor", str(_factor(spec))]
    return []


def notes(spec: ModelSpec) -> Iterator[str]:
    """Yield what Megatron must be told by hand, one line each."""
    if spec.rotary_scaling is None:
        return
    scaling = spec.rotary_scaling
    kind = scaling["rope_type"]
    if kind == "llama3":
        if _factor(spec) != BUILDER_FACTOR:
            yield (
                f"rope_scaling factor {_factor(spec):g}: Megatron's gpt_builders.py (to core 0.19) "
                f"ignores --rope-scaling-factor and uses {BUILDER_FACTOR:g}; build GPTModel with "
                f"rope_scaling_factor={_factor(spec):g}"
            )
        for name, constant in LLAMA3_CONSTANTS.items():
            if scaling.get(name, constant) != constant:
                yield (
                    f"rope_scaling {name} {scaling[name]}: Megatron's RotaryEmbedding has "
                    f"{constant} fixed in _apply_scaling; change it there"
                )
    elif _is_whole_linear(spec):
        yield (
            "linear rope_scaling: pass --rotary-seq-len-interpolation-factor "
            f"{scaling['factor']:g}; gpt_builders.py ignores it: build GPTModel with "
            f"seq_len_interpolation_factor={scaling['factor']:g}"
        )
    else:
        yield (
            f"rope_scaling {dict(scaling)}: Megatron has no argument for {kind} scaling of a GPT "
            "model and runs without; the setting is kept for the way back"
        )


def _is_llama3(spec: ModelSpec) -> bool:
    return spec.rotary_scaling is not None and spec.rotary_scaling["rope_type"] == "llama3"


def _is_whole_linear(spec: ModelSpec) -> bool:
    scaling = spec.rotary_scaling
    return (
        scaling is not None
        and scaling["rope_type"] == "linear"
        and float(scaling["factor"]).is_integer()
    )


def _factor(spec: ModelSpec) -> float:
    if spec.rotary_scaling is None or not _is_llama3(spec):
        return BUILDER_FACTOR
    return float(spec.rotary_scaling["factor"])
