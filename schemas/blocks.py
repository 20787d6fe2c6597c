"""Blocks that the layouts of many families share: attention, MLP, norms, and when they apply."""

from __future__ import annotations

from ckptx.schema import QKV, Rule, Section, rule
from ckptx.spec import ModelSpec


def layer_norm_bias(spec: ModelSpec) -> bool:
    """Whether norms have a bias."""
    return spec.normalization == "LayerNorm"


def qkv_bias(spec: ModelSpec) -> bool:
    """Whether query, key and value have a bias."""
    return spec.add_qkv_bias or spec.add_bias_linear


def dense_bias(spec: ModelSpec) -> bool:
    """Whether the attention's output projection has a bias."""
    return spec.add_bias_linear or bool(spec.extra.get("attention_out_bias"))


def mlp_bias(spec: ModelSpec) -> bool:
    """Whether the projections of the MLP have a bias."""
    return spec.add_bias_linear or bool(spec.extra.get("mlp_bias"))


def qk_norm(spec: ModelSpec) -> bool:
    """Whether every head of query and key is normalised."""
    return spec.qk_layernorm


def untied(spec: ModelSpec) -> bool:
    """Whether the output layer has a weight of its own."""
    return not spec.tied


def gated(spec: ModelSpec) -> bool:
    """Whether the MLP has a gate."""
    return spec.gated


def ungated(spec: ModelSpec) -> bool:
    """Whether the MLP has no gate."""
    return not spec.gated


def hf_attention(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of ``self_attn`` as Llama's relatives name it."""
    names = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
    return (
        rule("qkv weight", [f"{name}.weight" for name in names], QKV),
        rule("qkv bias", [f"{name}.bias" for name in names], QKV, when=qkv_bias),
        rule("dense weight", f"{prefix}self_attn.o_proj.weight"),
        rule("dense bias", f"{prefix}self_attn.o_proj.bias", when=dense_bias),
        rule("q norm weight", f"{prefix}self_attn.q_norm.weight", when=qk_norm),
        rule("k norm weight", f"{prefix}self_attn.k_norm.weight", when=qk_norm),
    )


def hf_gated_mlp(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a gated ``mlp`` as Llama's relatives name it."""
    return (
        rule("mlp l0 weight W", f"{prefix}mlp.gate_proj.weight"),
        rule("mlp l0 bias W", f"{prefix}mlp.gate_proj.bias", when=mlp_bias),
        rule("mlp l0 weight V", f"{prefix}mlp.up_proj.weight"),
        rule("mlp l0 bias V", f"{prefix}mlp.up_proj.bias", when=mlp_bias),
        rule("mlp l1 weight", f"{prefix}mlp.down_proj.weight"),
        rule("mlp l1 bias", f"{prefix}mlp.down_proj.bias", when=mlp_bias),
    )


def hf_decoder() -> tuple[Section, ...]:
    """Return the sections of a Llama-like decoder in transformers' module order."""
    layer = "model.layers.{layer}."
    return (
        Section("embeddings", (rule("word embeddings", "model.embed_tokens.weight"),)),
        Section(
            "transformer layer {layer}",
            (
                *hf_attention(layer),
                *hf_gated_mlp(layer),
                rule("input norm weight", f"{layer}input_layernorm.weight"),
                rule("post norm weight", f"{layer}post_attention_layernorm.weight"),
            ),
        ),
        Section("final norm", (rule("weight", "model.norm.weight"),)),
        Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
    )
