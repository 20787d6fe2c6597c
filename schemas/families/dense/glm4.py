"""GLM-4-0414 (``Glm4ForCausalLM``), as Hugging Face names it: GLM-4 with two more norms a layer.

Source: huggingface/transformers src/transformers/models/glm4/*.py @ v5.23.0.
"""

from __future__ import annotations

from dataclasses import replace

from ckptx.model.layout import Layout, Rule, rule
from ckptx.schemas.conventions.blocks import hf_decoder, hf_fused_gated_mlp
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.glm import TABLE


def _norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("input norm weight", f"{prefix}input_layernorm.weight"),
        rule("post norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("attention output norm weight", f"{prefix}post_self_attn_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_mlp_layernorm.weight"),
    )


FAMILY = decoder_family(
    "glm4",
    replace(TABLE, architecture="Glm4ForCausalLM"),
    Layout("hf/glm4", hf_decoder(mlp=hf_fused_gated_mlp, norms=_norms)),
    refused=not_in_megatron("norm of what attention and MLP return"),
)
