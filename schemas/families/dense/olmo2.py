"""OLMo 2, as Hugging Face names it.

It normalises what attention and MLP return, not what they get, and query and key as wholes.

Source: huggingface/transformers src/transformers/models/olmo2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Layout, Rule, rule
from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.conventions.blocks import hf_attention, hf_decoder, qk_projection_norms
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family


def _attention(prefix: str) -> tuple[Rule, ...]:
    return (*hf_attention(prefix), *qk_projection_norms(prefix))


def _norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("attention output norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_feedforward_layernorm.weight"),
    )


FAMILY = decoder_family(
    "olmo2",
    ConfigTable(
        "Olmo2ForCausalLM",
        LLAMA_DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5},
        ("attention_bias",),
        names={"head_dim": None},
    ),
    Layout("hf/olmo2", hf_decoder(_attention, norms=_norms)),
    refused=not_in_megatron(
        "norm of what attention and MLP return, and norms query and key head by head only"
    ),
)
