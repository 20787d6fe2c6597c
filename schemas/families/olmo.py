"""OLMo 2, as Hugging Face names it.

It normalises what attention and MLP return, not what they get, and query and key as wholes.

Source: huggingface/transformers src/transformers/models/olmo2/modeling_olmo2.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_attention, hf_decoder, hf_gated_mlp
from ckptx.schemas.conventions.mcore import not_in_megatron


def _attention(prefix: str) -> tuple[Rule, ...]:
    return (
        *hf_attention(prefix),
        rule("q projection norm weight", f"{prefix}self_attn.q_norm.weight"),
        rule("k projection norm weight", f"{prefix}self_attn.k_norm.weight"),
    )


def _norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("attention output norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_feedforward_layernorm.weight"),
    )


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    layouts={"hf": Layout("hf/olmo2", hf_decoder(_attention, hf_gated_mlp, _norms))},
    from_config=partial(spec_from_config, family="olmo2"),
    to_config=config_from_spec,
    refused=not_in_megatron(
        "norm of what attention and MLP return, and norms query and key head by head only"
    ),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(OLMO2)
