"""DeepSeek V2 and V3, and what shares their classes (R1, Moonlight, Kimi K2), in their own names.

Attention goes through latent vectors. V3's files hold the layers for multi-token prediction after
the last decoder layer, each with copies of the embedding and of the output layer; transformers
loads and saves V3 without them.

Source: huggingface/transformers src/transformers/models/{deepseek_v2,deepseek_v3}/modeling_*.py @
v5.23.0; deepseek-ai/DeepSeek-V3 README_WEIGHTS.md and model.safetensors.index.json @ main.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, Section, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_gated_mlp, hf_norms, norm, qk_norm, untied
from ckptx.schemas.conventions.mcore import (
    MCORE,
    MCORE_LOCAL,
    both,
    direct_query,
    expert_bias,
    latent_query,
    moe,
    not_moe,
    shared_experts,
)
from ckptx.schemas.families.moe import experts_of

LAYER = "model.layers.{layer}."
_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_LATENT_ATTENTION = (
    rule("q projection weight", f"{_ATTENTION}q_proj.weight", when=direct_query),
    rule("q down weight", f"{_ATTENTION}q_a_proj.weight", when=latent_query),
    rule(
        "q down norm weight",
        f"{_ATTENTION}q_a_layernorm.weight",
        when=both(latent_query, qk_norm),
    ),
    rule("q up weight", f"{_ATTENTION}q_b_proj.weight", when=latent_query),
    rule("kv down weight", f"{_ATTENTION}kv_a_proj_with_mqa.weight"),
    rule("kv down norm weight", f"{_ATTENTION}kv_a_layernorm.weight", when=qk_norm),
    rule("kv up weight", f"{_ATTENTION}kv_b_proj.weight"),
    rule("dense weight", f"{_ATTENTION}o_proj.weight"),
)
_SHARED = tuple(
    rule(
        f"shared mlp {key}", f"{_MLP}shared_experts.{part}.weight", when=shared_experts, layers=moe
    )
    for key, part in zip(("l0 weight W", "l0 weight V", "l1 weight"), _PROJECTIONS, strict=True)
)
_LAYER: tuple[Rule, ...] = (
    *_LATENT_ATTENTION,
    *(entry.only_in(not_moe) for entry in hf_gated_mlp(LAYER)),
    rule("router weight", f"{_MLP}gate.weight", layers=moe),
    rule(
        "router expert bias",
        f"{_MLP}gate.e_score_correction_bias",
        layers=moe,
        when=expert_bias,
    ),
    *experts_of(_MLP, *_PROJECTIONS),
    *_SHARED,
    *hf_norms(LAYER),
)
_FURTHER_LAYER = (
    *norm("embedding norm", f"{LAYER}enorm"),
    *norm("hidden norm", f"{LAYER}hnorm"),
    rule("projection weight", f"{LAYER}eh_proj.weight"),
    *_LAYER,
    *norm("final norm", f"{LAYER}shared_head.norm"),
)
_SECTIONS = (
    Section("embeddings", (rule("word embeddings", "model.embed_tokens.weight"),)),
    Section("transformer layer {layer}", _LAYER),
    Section("mtp layer {layer}", _FURTHER_LAYER, numbered_on=True),
    Section("final norm", norm("", "model.norm")),
    Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
)
_COPIES = (
    ("embeddings", "word embeddings", f"{LAYER}embed_tokens.weight"),
    ("output layer", "weight", f"{LAYER}shared_head.head.weight"),
)
_IGNORED = ("rotary_emb.inv_freq",)
_MEGATRON = {name: layout for name, layout in MCORE.items() if name not in MCORE_LOCAL}
_REFUSED = dict.fromkeys(
    MCORE_LOCAL,
    "the attention of Megatron's local spec has one size for all heads, latent attention has two; "
    "write Transformer Engine's names",
) | {"legacy": "legacy Megatron has no multi-latent attention"}

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    layouts={"hf": Layout("hf/deepseek_v2", _SECTIONS, _IGNORED), **_MEGATRON},
    from_config=partial(spec_from_config, family="deepseek_v2"),
    to_config=config_from_spec,
    refused=_REFUSED,
    limits=(
        "V2 ranks a group of experts by its best one, Megatron Core 0.16 by the sum of its best "
        "moe_router_topk / moe_router_group_topk: with groups (not V2-Lite) some tokens go to "
        "other experts, which the report names",
    ),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3", "kimi_k2"),
    layouts={"hf": Layout("hf/deepseek_v3", _SECTIONS, _IGNORED, _COPIES), **_MEGATRON},
    from_config=partial(spec_from_config, family="deepseek_v3"),
    to_config=config_from_spec,
    refused=_REFUSED,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    register(DEEPSEEK_V2)
    register(DEEPSEEK_V3)
