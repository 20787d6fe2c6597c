"""Mixtral, Qwen 2 and 3 with experts, and OLMoE, as Hugging Face names them.

Files have one set of tensors per expert; transformers 5 fuses them in memory, and state dicts that
were saved as they are have those names. Both are read, the first is written.

Source: huggingface/transformers src/transformers/models/{mixtral,qwen2_moe,qwen3_moe,olmoe}/
modeling_*.py, conversion_mapping.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, Section, rule
from ckptx.model.transforms import EXPERT_GLU, IDENTITY, per_expert
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_attention, hf_gated_mlp, untied
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.mcore import MCORE, moe, not_moe, shared_experts, shared_gate

LAYER = "model.layers.{layer}."
MLP = LAYER + "mlp."
_GATE_UP = ["mlp l0 weight W", "mlp l0 weight V"]


def experts_of(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of experts called ``prefix`` and a number; in memory they are fused.

    In memory they lie in ``mlp`` whatever ``prefix`` is.
    """
    own = f"{prefix}experts.{{expert}}."
    fused = f"{MLP}experts."
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


def _router(*names: str) -> Rule:
    return rule("router weight", names[0], layers=moe, also=names[1:])


def _decoder(attention: tuple[Rule, ...], mlp: tuple[Rule, ...]) -> tuple[Section, ...]:
    norms = (
        rule("input norm weight", f"{LAYER}input_layernorm.weight"),
        rule("post norm weight", f"{LAYER}post_attention_layernorm.weight"),
    )
    return (
        Section("embeddings", (rule("word embeddings", "model.embed_tokens.weight"),)),
        Section("transformer layer {layer}", (*attention, *mlp, *norms)),
        Section("final norm", (rule("weight", "model.norm.weight"),)),
        Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
    )


_MIXTRAL = LAYER + "block_sparse_moe."
_NAMES = ("gate_proj", "up_proj", "down_proj")
_DENSE = tuple(entry.only_in(not_moe) for entry in hf_gated_mlp(LAYER))
_SHARED = tuple(
    rule(f"shared mlp {key}", f"{MLP}shared_expert.{part}.weight", when=shared_experts, layers=moe)
    for key, part in zip(("l0 weight W", "l0 weight V", "l1 weight"), _NAMES, strict=True)
)
_SHARED_GATE = rule(
    "shared gate weight", f"{MLP}shared_expert_gate.weight", when=shared_gate, layers=moe
)
# Mixtral's own prefix is that of files; transformers 5 calls the module ``mlp`` in memory.
_MIXTURE = (*experts_of(_MIXTRAL, "w1", "w3", "w2"),)
_QWEN = (*_DENSE, _router(f"{MLP}gate.weight"), *experts_of(MLP, *_NAMES))
_PROJECTION_NORMS = (
    rule("q projection norm weight", f"{LAYER}self_attn.q_norm.weight"),
    rule("k projection norm weight", f"{LAYER}self_attn.k_norm.weight"),
)

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    layouts={
        "hf": Layout(
            "hf/mixtral",
            _decoder(
                hf_attention(LAYER),
                (_router(f"{_MIXTRAL}gate.weight", f"{MLP}gate.weight"), *_MIXTURE),
            ),
        ),
        **MCORE,
    },
    from_config=partial(spec_from_config, family="mixtral"),
    to_config=config_from_spec,
    refused={"legacy": NOT_LEGACY["experts"]},
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    layouts={
        "hf": Layout(
            "hf/qwen2_moe", _decoder(hf_attention(LAYER), (*_QWEN, *_SHARED, _SHARED_GATE))
        ),
        **MCORE,
    },
    from_config=partial(spec_from_config, family="qwen2_moe"),
    to_config=config_from_spec,
    refused={"legacy": NOT_LEGACY["experts"]},
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    layouts={"hf": Layout("hf/qwen3_moe", _decoder(hf_attention(LAYER), _QWEN)), **MCORE},
    from_config=partial(spec_from_config, family="qwen3_moe"),
    to_config=config_from_spec,
    refused={"legacy": NOT_LEGACY["experts"]},
)

OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    layouts={
        "hf": Layout(
            "hf/olmoe",
            _decoder(
                (*hf_attention(LAYER), *_PROJECTION_NORMS),
                (_router(f"{MLP}gate.weight"), *experts_of(MLP, *_NAMES)),
            ),
        )
    },
    from_config=partial(spec_from_config, family="olmoe"),
    to_config=config_from_spec,
    refused=dict.fromkeys(
        (*MCORE, "legacy"),
        "Megatron Core 0.16 norms query and key head by head, OLMoE each as a whole",
    ),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE):
        register(family)
