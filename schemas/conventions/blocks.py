"""Blocks that the layouts of many families share: attention, MLP, norms, and when they apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ckptx.model.layout import Rule, Section, rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import FUSED_QKV, GLU, QKV

Block: TypeAlias = Callable[[str], tuple[Rule, ...]]
"""The rules of a part of a layer, given the prefix of the layer's names."""


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


def qk_projection_norms(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of norms of query and key as wholes, not head by head."""
    return (
        rule("q projection norm weight", f"{prefix}self_attn.q_norm.weight"),
        rule("k projection norm weight", f"{prefix}self_attn.k_norm.weight"),
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


def hf_fused_gated_mlp(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a gated ``mlp`` without biases whose gate and up are one tensor."""
    return (
        rule(["mlp l0 weight W", "mlp l0 weight V"], f"{prefix}mlp.gate_up_proj.weight", GLU),
        rule("mlp l1 weight", f"{prefix}mlp.down_proj.weight"),
    )


def hf_fused_attention(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of ``self_attn`` without biases whose projections are one tensor."""
    return (
        rule("qkv weight", f"{prefix}self_attn.qkv_proj.weight", FUSED_QKV),
        rule("dense weight", f"{prefix}self_attn.o_proj.weight"),
    )


def norm(key: str, name: str) -> tuple[Rule, Rule]:
    """Return the rules of a norm called ``name``; ``key`` goes before ``weight`` and ``bias``."""
    return (
        rule(f"{key} weight".strip(), f"{name}.weight"),
        rule(f"{key} bias".strip(), f"{name}.bias", when=layer_norm_bias),
    )


def hf_norms(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a layer's norms as Llama's relatives name them."""
    return (
        *norm("input norm", f"{prefix}input_layernorm"),
        *norm("post norm", f"{prefix}post_attention_layernorm"),
    )


def hf_decoder(
    attention: Block = hf_attention, mlp: Block = hf_gated_mlp, norms: Block = hf_norms
) -> tuple[Section, ...]:
    """Return the sections of a Llama-like decoder in transformers' module order."""
    layer = "model.layers.{layer}."
    return (
        Section("embeddings", (rule("word embeddings", "model.embed_tokens.weight"),)),
        Section("transformer layer {layer}", (*attention(layer), *mlp(layer), *norms(layer))),
        Section("final norm", norm("", "model.norm")),
        Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
    )
