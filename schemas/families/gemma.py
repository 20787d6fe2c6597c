"""Gemma and Gemma 2, as Hugging Face names them.

Their norms multiply by 1 + weight, as Megatron's do with ``layernorm_zero_centered_gamma``, so the
weights are the same. Embeddings are multiplied by the square root of the hidden size, which
Megatron has no switch for: see `ckptx.schemas.megatron_settings.args.notes`.

Source: huggingface/transformers src/transformers/models/{gemma,gemma2}/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_decoder
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.mcore import MCORE, MCORE_LOCAL, not_in_megatron


def _gemma2_norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("input norm weight", f"{prefix}input_layernorm.weight"),
        rule("attention output norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("post norm weight", f"{prefix}pre_feedforward_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_feedforward_layernorm.weight"),
    )


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    layouts={
        "hf": Layout("hf/gemma", hf_decoder(), ("rotary_emb.inv_freq",)),
        **{name: layout for name, layout in MCORE.items() if name not in MCORE_LOCAL},
    },
    from_config=partial(spec_from_config, family="gemma"),
    to_config=config_from_spec,
    refused={
        **dict.fromkeys(
            MCORE_LOCAL,
            "the norms of Megatron's local spec are not zero-centred "
            "(megatron/core/transformer/torch_norm.py asserts it); write Transformer Engine's "
            "names",
        ),
        "legacy": NOT_LEGACY["geglu"],
    },
    limits=(
        "Megatron Core 0.16 has no setting for the scale of Gemma's embeddings: the model needs a "
        "forward hook, which the report names",
    ),
)

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    layouts={"hf": Layout("hf/gemma2", hf_decoder(norms=_gemma2_norms))},
    from_config=partial(spec_from_config, family="gemma2"),
    to_config=config_from_spec,
    refused=not_in_megatron("norm of what attention and MLP return, and no soft cap on logits"),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    register(GEMMA)
    register(GEMMA2)
