"""GLM-4 (``GlmForCausalLM``) and GLM-4-0414 (``Glm4ForCausalLM``), as Hugging Face names them.

Gate and up are one tensor; half of every head is rotated, in pairs of neighbours, as Megatron does
with ``rotary_interleaved``. Glm4 has norms of what attention and MLP return besides.

Source: huggingface/transformers src/transformers/models/{glm,glm4}/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_attention, hf_decoder, hf_fused_gated_mlp
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.mcore import MCORE, not_in_megatron


def _glm4_norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("input norm weight", f"{prefix}input_layernorm.weight"),
        rule("post norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("attention output norm weight", f"{prefix}post_self_attn_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_mlp_layernorm.weight"),
    )


GLM = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    layouts={
        "hf": Layout("hf/glm", hf_decoder(hf_attention, hf_fused_gated_mlp)),
        **MCORE,
    },
    from_config=partial(spec_from_config, family="glm"),
    to_config=config_from_spec,
    refused={"legacy": NOT_LEGACY["rotary"]},
)

GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    layouts={"hf": Layout("hf/glm4", hf_decoder(hf_attention, hf_fused_gated_mlp, _glm4_norms))},
    from_config=partial(spec_from_config, family="glm4"),
    to_config=config_from_spec,
    refused=not_in_megatron("norm of what attention and MLP return"),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    register(GLM)
    register(GLM4)
