"""Mixtures of experts as Hugging Face names them: one set of tensors per expert.

transformers 5 fuses them in memory, and state dicts that were saved as they are have those names.
Both are read, the first is written.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe}/
modeling_*.py, conversion_mapping.py @ v5.23.0.
"""

from __future__ import annotations

from functools import partial

from ckptx.model.layout import Rule, rule
from ckptx.model.transforms import EXPERT_GLU, IDENTITY, per_expert
from ckptx.schemas.conventions.blocks import GATE_UP, hf_gated_mlp, moe, not_moe, shared_experts

_FUSED = "model.layers.{layer}.mlp.experts."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def experts_of(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of experts called ``prefix`` and a number; in memory they are fused.

    In memory they lie in ``mlp`` whatever ``prefix`` is.
    """
    gate, up, down = (f"{prefix}experts.{{expert}}.{part}.weight" for part in (gate, up, down))
    experts = partial(rule, ep=0, layers=moe)
    fused = [(f"{_FUSED}gate_up_proj", EXPERT_GLU)]
    return (
        experts(GATE_UP, [gate, up], per_expert(width=2), also=fused),
        experts("mlp l1 weight", down, per_expert(), also=[(f"{_FUSED}down_proj", IDENTITY)]),
    )


def shared_expert(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of the expert that every token goes through."""
    keys = ("l0 weight W", "l0 weight V", "l1 weight")
    shared = partial(rule, when=shared_experts, layers=moe)
    return tuple(
        shared(f"shared mlp {key}", f"{prefix}{part}.weight")
        for key, part in zip(keys, PROJECTIONS, strict=True)
    )


def router(name: str, *others: str) -> Rule:
    """Return the rule of what chooses the experts of a token."""
    return rule("router weight", name, layers=moe, also=others)


def dense_layers(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of the MLP in layers that are no mixtures."""
    return tuple(entry.only_in(not_moe) for entry in hf_gated_mlp(prefix))


def mixture(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a mixture in ``mlp``."""
    mlp = f"{prefix}mlp."
    return (router(f"{mlp}gate.weight"), *experts_of(mlp, *PROJECTIONS))


def qwen_experts(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a mixture, or of the MLP of a dense layer, as Qwen names them."""
    return (*dense_layers(prefix), *mixture(prefix))
