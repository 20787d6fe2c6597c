"""Mixtures of experts in ``config.json``: the families that are one, by their own words.

The rest of the config is in `ckptx.schemas.config.translate`, which calls this.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe,
deepseek_v2,deepseek_v3}/configuration_*.py @ v5.23.0; deepseek-ai/DeepSeek-V2, DeepSeek-V3
config.json @ main.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.routing import DeepSeekMixture, Mixture

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
    "deepseek_v2": DeepSeekMixture(
        {
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": None,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
        },
        count="n_routed_experts",
        only={"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    ),
    "deepseek_v3": DeepSeekMixture(
        {
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "topk_method": "noaux_tc",
            "n_group": 8,
            "topk_group": 4,
        },
        count="n_routed_experts",
        only={
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
        },
        biased=True,
    ),
}
"""By family; the others have no experts."""


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
    return {} if mixture is None else mixture.attributes(values)


def to_config(spec: ModelSpec, family: str | None = None) -> dict[str, Any]:
    """Return the keys that the config of a family has for its experts."""
    mixture = FAMILIES.get(family or spec.family)
    if mixture is None:
        return {}
    said = mixture.settings(spec)
    if spec.family == "qwen3_moe":
        said["use_sliding_window"] = spec.extra.get("sliding_window") is not None
    return said


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


def unsupported_by_config(spec: ModelSpec, family: str) -> list[str]:
    """Return what a spec says of experts that the config of a family cannot say."""
    mixture = FAMILIES.get(family)
    if mixture is None or not spec.num_experts:
        fits = (mixture is None) == (not spec.num_experts)
        return [] if fits else ["experts" if mixture is None else "no experts"]
    return mixture.unheld(spec)


def _windows(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return sliding windows in the spelling that `ckptx.schemas.config.translate` reads."""
    if family == "qwen3_moe" and not values.get("use_sliding_window"):
        return {"sliding_window": None}
    if family != "qwen2_moe" or not values.get("use_sliding_window") or values.get("layer_types"):
        return {}
    inside = (
        layer % 2 == 0 and layer < values["max_window_layers"]
        for layer in range(values["num_hidden_layers"])
    )
    return {"layer_types": ["sliding_attention" if one else "full_attention" for one in inside]}
