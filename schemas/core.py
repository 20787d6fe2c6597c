"""Megatron Core's GPT model: names of parameters, and of the states its modules keep besides.

Two spellings exist. With Transformer Engine the norms before attention and MLP are part of the
linear layer that follows; the ``local`` spec has them as modules. Loaders accept either, savers
write the first unless told otherwise. Rules stand in the order in which Megatron registers
parameters.

Source: NVIDIA/Megatron-LM megatron/core/models/gpt/gpt_layer_specs.py,
megatron/core/transformer/{attention,mlp,transformer_layer}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptx.schema import GLU, SAME, Iso, Layout, Predicate, Rule, Section, always, rule
from ckptx.schemas.blocks import (
    dense_bias,
    gated,
    layer_norm_bias,
    mlp_bias,
    qk_norm,
    qkv_bias,
    ungated,
    untied,
)
from ckptx.spec import ModelSpec

LAYER = "decoder.layers.{layer}."
ATTENTION = LAYER + "self_attention."
MLP = LAYER + "mlp."


def learned_positions(spec: ModelSpec) -> bool:
    """Whether positions have an embedding table."""
    return spec.position_embedding_type == "learned_absolute"


def both(*predicates: Predicate) -> Predicate:
    """Return the predicate that all of these hold."""
    return lambda spec: all(predicate(spec) for predicate in predicates)


def _norm(kind: str, key: str, name: str, other: str, when: Predicate = always) -> Rule:
    """Return the rule of a norm's ``weight`` or ``bias`` (``kind``), which ``other`` also names."""
    return rule(f"{key} {kind}", name + kind, when=when, also=[other + kind])


def _fc1(kind: str, when: Predicate) -> tuple[Rule, Rule]:
    name = f"{MLP}linear_fc1.{kind}"
    halves: list[tuple[list[str], Iso]] = [([f"{name}_w", f"{name}_v"], SAME)]
    keys = [f"mlp l0 {kind} W", f"mlp l0 {kind} V"]
    return (
        # The halves are what singleton_local_shards writes.
        rule(keys, name, GLU, tp=0, when=both(gated, when), also=halves),
        rule(f"mlp l0 {kind}", name, tp=0, when=both(ungated, when)),
    )


def _norms(key: str, fused: str, module: str, *, local: bool) -> tuple[Rule, Rule]:
    names = (module, fused) if local else (fused, module)
    return (
        _norm("weight", key, *names),
        _norm("bias", key, *names, when=layer_norm_bias),
    )


def mcore_gpt(*, local: bool) -> Layout:
    """Return the layout of a GPT model, in the names of Transformer Engine or of the local spec."""
    input_norm = _norms(
        "input norm", f"{ATTENTION}linear_qkv.layer_norm_", f"{LAYER}input_layernorm.", local=local
    )
    post_norm = _norms(
        "post norm", f"{MLP}linear_fc1.layer_norm_", f"{LAYER}pre_mlp_layernorm.", local=local
    )
    dense = (
        rule("dense weight", f"{ATTENTION}linear_proj.weight", tp=1),
        rule("dense bias", f"{ATTENTION}linear_proj.bias", when=dense_bias),
    )
    qkv = (
        rule("qkv weight", f"{ATTENTION}linear_qkv.weight", tp=0),
        rule("qkv bias", f"{ATTENTION}linear_qkv.bias", tp=0, when=qkv_bias),
    )
    qk_norms = (
        rule("q norm weight", f"{ATTENTION}q_layernorm.weight", when=qk_norm),
        rule("k norm weight", f"{ATTENTION}k_layernorm.weight", when=qk_norm),
    )
    mlp = (
        *_fc1("weight", always),
        *_fc1("bias", mlp_bias),
        rule("mlp l1 weight", f"{MLP}linear_fc2.weight", tp=1),
        rule("mlp l1 bias", f"{MLP}linear_fc2.bias", when=mlp_bias),
    )
    layer = (
        (*input_norm, *dense, *qkv, *qk_norms, *post_norm, *mlp)
        if local
        else (*dense, *input_norm, *qkv, *qk_norms, *post_norm, *mlp)
    )
    return Layout(
        "mcore/gpt-local" if local else "mcore/gpt",
        (
            Section(
                "embeddings",
                (
                    rule("word embeddings", "embedding.word_embeddings.weight", tp=0),
                    rule(
                        "position embeddings",
                        "embedding.position_embeddings.weight",
                        when=learned_positions,
                    ),
                ),
            ),
            Section("transformer layer {layer}", layer),
            Section(
                "final norm",
                (
                    rule("weight", "decoder.final_layernorm.weight"),
                    rule("bias", "decoder.final_layernorm.bias", when=layer_norm_bias),
                ),
            ),
            Section("output layer", (rule("weight", "output_layer.weight", tp=0, when=untied),)),
        ),
        ignored=("_extra_state",),
    )


MCORE_GPT = mcore_gpt(local=False)
MCORE_GPT_LOCAL = mcore_gpt(local=True)
TIED_COPY = "output_layer.weight"
"""The copy of tied embeddings on the last stage of a per-rank checkpoint with several stages."""


@dataclass(frozen=True, slots=True)
class ExtraState:
    """A module that keeps an ``_extra_state``: quantisation state, empty without fp8.

    Transformer Engine's modules hold an empty byte tensor, Megatron's own hold None. Loading at
    Megatron's default strictness misses every state that its model has and a checkpoint has not.
    """

    message: str
    module: str
    engine: bool
    """Whether it is Transformer Engine's, so that its value is a tensor."""
    distributed: bool = True
    """Whether ``torch_dist`` holds it, too."""
    when: Predicate = always


def extra_states(*, local: bool) -> Iterator[ExtraState]:
    """Yield the modules of a GPT model that keep an extra state."""
    layer = "transformer layer {layer}"

    def state(module: str, when: Predicate = always, *, distributed: bool = True) -> ExtraState:
        return ExtraState(layer, module, not local, distributed, when)

    if not local:
        yield state(f"{ATTENTION}core_attention", distributed=False)
    yield state(f"{ATTENTION}linear_proj")
    yield state(f"{ATTENTION}linear_qkv")
    if not local:
        yield state(f"{ATTENTION}q_layernorm", qk_norm)
        yield state(f"{ATTENTION}k_layernorm", qk_norm)
    yield state(f"{MLP}linear_fc1")
    yield state(f"{MLP}linear_fc2")
    if not local:
        yield ExtraState("final norm", "decoder.final_layernorm", True)
    yield ExtraState("output layer", "output_layer", False, distributed=False)
