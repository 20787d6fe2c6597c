"""Blocks that the layouts of many families share: attention, MLP, norms, and when they apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from ckptx.model.layout import LayerPredicate, Predicate, Rule, Section, always, rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import FUSED_QKV, GLU, IDENTITY, QKV, Transform

Block: TypeAlias = Callable[[str], tuple[Rule, ...]]
"""The rules of a part of a layer, given the prefix of the layer's names."""
GATE_UP = ("mlp l0 weight W", "mlp l0 weight V")
"""The keys of gate and up projection."""


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


def learned_positions(spec: ModelSpec) -> bool:
    """Whether positions have an embedding table."""
    return spec.position_embedding_type == "learned_absolute"


def shared_experts(spec: ModelSpec) -> bool:
    """Whether mixtures have an expert that every token goes through."""
    return bool(spec.moe_shared_expert_intermediate_size)


def shared_gate(spec: ModelSpec) -> bool:
    """Whether the shared expert has a gate."""
    return spec.moe_shared_expert_gate


def expert_bias(spec: ModelSpec) -> bool:
    """Whether the router balances experts by a bias."""
    return spec.moe_router_enable_expert_bias


def moe(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    return spec.is_moe(layer)


def not_moe(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer has one MLP."""
    return not spec.is_moe(layer)


def latent_query(spec: ModelSpec) -> bool:
    """Whether the query too goes through a latent vector."""
    return spec.multi_latent_attention and spec.q_lora_rank is not None


def direct_query(spec: ModelSpec) -> bool:
    """Whether the query of latent attention is projected from the hidden state."""
    return spec.multi_latent_attention and spec.q_lora_rank is None


def both(*predicates: Predicate) -> Predicate:
    """Return the predicate that all of these hold."""
    return lambda spec: all(predicate(spec) for predicate in predicates)


def only_for(when: Predicate, *rules: Rule) -> tuple[Rule, ...]:
    """Return the rules for the models that ``when`` holds of."""
    return tuple(replace(entry, when=both(when, entry.when)) for entry in rules)


def linear(
    key: str,
    names: str | Sequence[str],
    transform: Transform = IDENTITY,
    *,
    bias: Predicate = always,
    tp: int | None = None,
    when: Predicate = always,
    layers: LayerPredicate | None = None,
) -> tuple[Rule, Rule]:
    """Return the rules of a matrix and of its bias, which some models have.

    Names end in ``weight`` and ``bias``, and so does ``key``, unless it has ``{}`` where that
    stands. Ranks that cut the rows of a matrix, ``tp=0``, cut its bias, too.
    """
    modules = [names] if isinstance(names, str) else names
    keyed = key if "{}" in key else f"{key} {{}}".strip()

    def one(kind: str, tp: int | None, when: Predicate) -> Rule:
        named = [f"{name}.{kind}" for name in modules]
        return rule(keyed.format(kind), named, transform, tp=tp, when=when, layers=layers)

    return one("weight", tp, when), one("bias", None if tp else tp, both(when, bias))


def megatron_fc1(module: str, halves: Sequence[str] = ()) -> tuple[Rule, ...]:
    """Return the rules of a dense layer's first projection, gate and up in one where it is gated.

    ``halves`` are endings that further names of the gate and of up have.
    """
    rules = []
    for kind, when in (("weight", always), ("bias", mlp_bias)):
        name, of_layer = f"{module}.{kind}", partial(rule, tp=0, layers=not_moe)
        apart = [[name + ending for ending in halves]] if halves else []
        keys, also = [f"mlp l0 {kind} W", f"mlp l0 {kind} V"], [(one, IDENTITY) for one in apart]
        rules.append(of_layer(keys, name, GLU, when=both(gated, when), also=also))
        rules.append(of_layer(f"mlp l0 {kind}", name, when=both(ungated, when)))
    return tuple(rules)


def norm(key: str, name: str, when: Predicate = always) -> tuple[Rule, Rule]:
    """Return the rules of a norm called ``name``; ``key`` goes before ``weight`` and ``bias``."""
    return linear(key, name, bias=layer_norm_bias, when=when)


def layer_norms(names: Mapping[str, str]) -> Block:
    """Return the block of a layer's norms: their keys, and what the layer calls them."""
    return lambda prefix: tuple(
        entry for key, name in names.items() for entry in norm(key, prefix + name)
    )


def embedding_tables(prefix: str) -> tuple[Rule, Rule]:
    """Return the rules of Megatron's embeddings."""
    words, positions = (f"{prefix}{table}_embeddings.weight" for table in ("word", "position"))
    return (
        rule("word embeddings", words, tp=0),
        rule("position embeddings", positions, when=learned_positions),
    )


hf_norms = layer_norms({"input norm": "input_layernorm", "post norm": "post_attention_layernorm"})
"""The norms of Llama's relatives."""


def hf_attention(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of ``self_attn`` as Llama's relatives name it."""
    own = f"{prefix}self_attn."
    return (
        *linear("qkv", [f"{own}{part}_proj" for part in "qkv"], QKV, bias=qkv_bias),
        *linear("dense", f"{own}o_proj", bias=dense_bias),
        *(rule(f"{part} norm weight", f"{own}{part}_norm.weight", when=qk_norm) for part in "qk"),
    )


def hf_attention_whole_norms(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of ``self_attn`` with norms of query and key as wholes."""
    own = f"{prefix}self_attn."
    norms = (rule(f"{part} projection norm weight", f"{own}{part}_norm.weight") for part in "qk")
    return (*hf_attention(prefix), *norms)


def hf_gated_mlp(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a gated ``mlp`` as Llama's relatives name it."""
    names = {"mlp l0 {} W": "gate_proj", "mlp l0 {} V": "up_proj", "mlp l1": "down_proj"}
    return tuple(
        entry
        for key, name in names.items()
        for entry in linear(key, f"{prefix}mlp.{name}", bias=mlp_bias)
    )


def hf_fused_gated_mlp(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a gated ``mlp`` without biases whose gate and up are one tensor."""
    return (
        rule(GATE_UP, f"{prefix}mlp.gate_up_proj.weight", GLU),
        rule("mlp l1 weight", f"{prefix}mlp.down_proj.weight"),
    )


def hf_fused_attention(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of ``self_attn`` without biases whose projections are one tensor."""
    return (
        rule("qkv weight", f"{prefix}self_attn.qkv_proj.weight", FUSED_QKV),
        rule("dense weight", f"{prefix}self_attn.o_proj.weight"),
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
