"""Mixtures of experts as Hugging Face names them: one set of tensors per expert.

transformers 5 fuses them in memory, and state dicts that were saved as they are have those names.
Both are read, the first is written.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe}/
modeling_*.py, conversion_mapping.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Rule, rule
from ckptx.model.transforms import EXPERT_GLU, IDENTITY, per_expert
from ckptx.schemas.conventions.blocks import hf_gated_mlp
from ckptx.schemas.conventions.mcore import moe, not_moe

_LAYER = "model.layers.{layer}."
_MLP = f"{_LAYER}mlp."
_GATE_UP = ["mlp l0 weight W", "mlp l0 weight V"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def experts_of(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of experts called ``prefix`` and a number; in memory they are fused.

    In memory they lie in ``mlp`` whatever ``prefix`` is.
    """
    own = f"{prefix}experts.{{expert}}."
    fused = f"{_MLP}experts."
    return (
        rule(
            _GATE_UP,
            [f"{own}{gate}.weight", f"{own}{up}.weight"],
            per_expert(IDENTITY, 2),
            ep=0,
            layers=moe,
            also=[(f"{fused}gate_up_proj", EXPERT_GLU)],
        ),
        rule(
            "mlp l1 weight",
            f"{own}{down}.weight",
            per_expert(),
            ep=0,
            layers=moe,
            also=[(f"{fused}down_proj", IDENTITY)],
        ),
    )


def router(name: str, *others: str) -> Rule:
    """Return the rule of what chooses the experts of a token."""
    return rule("router weight", name, layers=moe, also=others)


def dense_layers(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of the MLP in layers that are no mixtures."""
    return tuple(entry.only_in(not_moe) for entry in hf_gated_mlp(prefix))


def qwen_experts(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a mixture, or of the MLP of a dense layer, as Qwen names them."""
    return (
        *dense_layers(prefix),
        router(f"{prefix}mlp.gate.weight"),
        *experts_of(f"{prefix}mlp.", *PROJECTIONS),
    )
