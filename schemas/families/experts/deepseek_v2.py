"""DeepSeek V2, as Hugging Face names it, and what V3 shares with it.

Attention goes through latent vectors; the first layers are dense.

Source: huggingface/transformers src/transformers/models/{deepseek_v2,deepseek_v3}/*.py @ v5.23.0;
deepseek-ai/DeepSeek-V2, DeepSeek-V3 config.json @ main.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptx.model.layout import Layout, Rule, Section, rule
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.experts import BALANCING, Mixture, counted
from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions import blocks, hf_experts
from ckptx.schemas.conventions.mcore import not_local
from ckptx.schemas.decoder import decoder_family

LAYER = "model.layers.{layer}."
_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."
_BIAS = f"{_MLP}gate.e_score_correction_bias"
_QUERY_NORM = blocks.both(blocks.latent_query, blocks.qk_norm)
_LAYER: tuple[Rule, ...] = (
    rule("q projection weight", f"{_ATTENTION}q_proj.weight", when=blocks.direct_query),
    rule("q down weight", f"{_ATTENTION}q_a_proj.weight", when=blocks.latent_query),
    rule("q down norm weight", f"{_ATTENTION}q_a_layernorm.weight", when=_QUERY_NORM),
    rule("q up weight", f"{_ATTENTION}q_b_proj.weight", when=blocks.latent_query),
    rule("kv down weight", f"{_ATTENTION}kv_a_proj_with_mqa.weight"),
    rule("kv down norm weight", f"{_ATTENTION}kv_a_layernorm.weight", when=blocks.qk_norm),
    rule("kv up weight", f"{_ATTENTION}kv_b_proj.weight"),
    rule("dense weight", f"{_ATTENTION}o_proj.weight"),
    *hf_experts.dense_layers(LAYER),
    hf_experts.router(f"{_MLP}gate.weight"),
    rule("router expert bias", _BIAS, layers=blocks.moe, when=blocks.expert_bias),
    *hf_experts.experts_of(_MLP, *hf_experts.PROJECTIONS),
    *hf_experts.shared_expert(f"{_MLP}shared_experts."),
    *blocks.hf_norms(LAYER),
)
_MTP_LAYER = (
    *blocks.norm("embedding norm", f"{LAYER}enorm"),
    *blocks.norm("hidden norm", f"{LAYER}hnorm"),
    rule("projection weight", f"{LAYER}eh_proj.weight"),
    *_LAYER,
    *blocks.norm("final norm", f"{LAYER}shared_head.norm"),
)
SECTIONS = (
    Section("embeddings", (rule("word embeddings", "model.embed_tokens.weight"),)),
    Section("transformer layer {layer}", _LAYER),
    Section("mtp layer {layer}", _MTP_LAYER, numbered_on=True),
    Section("final norm", blocks.norm("", "model.norm")),
    Section("output layer", (rule("weight", "lm_head.weight", when=blocks.untied),)),
)
IGNORED = ("rotary_emb.inv_freq",)
REFUSED = {
    **not_local(
        "the attention of Megatron's local spec has one size for all heads, latent attention has "
        "two"
    ),
    "legacy": "legacy Megatron has no multi-latent attention",
}
LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Defaults of the keys of latent attention."""
FIELDS = (
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
)
"""Keys of latent attention and the attributes of a spec."""


@dataclass(frozen=True, slots=True)
class DeepSeekMixture(Mixture):
    """DeepSeek's words: the first layers are dense, shared experts have no gate.

    With ``biased`` routing is that of V3 (sigmoid scores, a bias for every expert); else that of V2
    (softmax over all experts). Either may choose within the best groups of experts only.
    """

    biased: bool = False

    def attributes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a spec that a complete config says of experts."""
        ffn, dense = values[self.ffn], values["first_k_dense_replace"] or 0
        layers = tuple(layer >= dense for layer in range(values["num_hidden_layers"]))
        factor = float(values["routed_scaling_factor"] or 1.0)
        groups: dict[str, Any] = {}
        if values["topk_method"] in _GROUPED and (values["n_group"] or 1) > 1:
            chosen = {"moe_router_num_groups": "n_group", "moe_router_group_topk": "topk_group"}
            groups = {attribute: values[key] for attribute, key in chosen.items()}
        return {
            **counted(values, self.count),
            "moe_ffn_hidden_size": ffn,
            "moe_shared_expert_intermediate_size": (values["n_shared_experts"] or 0) * ffn or None,
            "moe_layers": () if all(layers) else layers,
            "moe_router_pre_softmax": not self.biased,
            "moe_router_score_function": "sigmoid" if self.biased else "softmax",
            "moe_router_enable_expert_bias": self.biased,
            "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
            **groups,
        }

    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys that the config has for the experts of a spec."""
        ffn, shared = spec.moe_ffn_hidden_size or 1, spec.moe_shared_expert_intermediate_size or 0
        grouped = bool(spec.moe_router_group_topk)
        method = "noaux_tc" if self.biased else _GROUPED[0] if grouped else "greedy"
        return {
            **self.only,
            self.count: spec.num_experts,
            "num_experts_per_tok": spec.moe_router_topk,
            self.ffn: ffn,
            "n_shared_experts": shared // ffn,
            "first_k_dense_replace": sum(not moe for moe in spec.moe_layers),
            "routed_scaling_factor": spec.moe_router_topk_scaling_factor or 1.0,
            "topk_method": method,
            "n_group": spec.moe_router_num_groups or 1,
            "topk_group": spec.moe_router_group_topk or 1,
        }

    def unheld(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says of its experts that the config cannot say."""
        shared = spec.moe_shared_expert_intermediate_size or 0
        score = spec.moe_router_score_function
        held = (
            (sorted(spec.moe_layers) == list(spec.moe_layers), "dense layers between mixtures"),
            (not shared % (spec.moe_ffn_hidden_size or 1), "part of a shared expert"),
            (not spec.moe_shared_expert_gate, "a gate of the shared expert"),
            (score == ("sigmoid" if self.biased else "softmax"), f"{score} scores"),
            (spec.moe_router_enable_expert_bias == self.biased, "expert biases, or their lack"),
            (self.biased or spec.moe_router_pre_softmax, "probabilities that add up to one"),
            (not spec.extra.get(BALANCING), f"{spec.extra.get(BALANCING)} routing"),
        )
        return [reason for fits, reason in held if not fits]


_GROUPED = ("group_limited_greedy", "noaux_tc")
"""The values of ``topk_method`` that choose within groups of experts."""

FAMILY = decoder_family(
    "deepseek_v2",
    ConfigTable(
        "DeepseekV2ForCausalLM",
        llama_defaults(vocab=102400) | LATENT,
        ("attention_bias", "mlp_bias"),
        qk_layernorm=True,
        names={"head_dim": "v_head_dim"},
        latent=True,
        fields=FIELDS,
        experts=DeepSeekMixture(
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
    ),
    Layout("hf/deepseek_v2", SECTIONS, IGNORED),
    refused=REFUSED,
    limits=(
        "V2 ranks a group of experts by its best one, Megatron Core 0.16 by the sum of its best "
        "moe_router_topk / moe_router_group_topk: with groups (not V2-Lite) some tokens go to "
        "other experts, which the report names",
    ),
    recognition=50,
)
