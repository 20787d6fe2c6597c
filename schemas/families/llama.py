"""Llama and Mistral, as Hugging Face names them, and as Meta does.

Source: huggingface/transformers src/transformers/models/{llama,mistral}/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_decoder
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE
from ckptx.schemas.conventions.meta import META, META_WIDTH
from ckptx.schemas.conventions.torchtitan import TORCHTITAN_LLAMA

# Llama checkpoints of 2023 hold the rotary frequencies, which are computed anew from the config.
_BUFFERS = ("rotary_emb.inv_freq",)

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    layouts={
        "hf": Layout("hf/llama", hf_decoder(), _BUFFERS),
        **MCORE,
        "legacy": LEGACY,
        "meta": META,
        "meta-width": META_WIDTH,
        **TORCHTITAN_LLAMA,
    },
    from_config=partial(spec_from_config, family="llama"),
    to_config=config_from_spec,
)

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    layouts={
        "hf": Layout("hf/mistral", hf_decoder(), _BUFFERS),
        **MCORE,
        "legacy": LEGACY,
        "meta": META,
        "meta-width": META_WIDTH,
    },
    from_config=partial(spec_from_config, family="mistral"),
    to_config=config_from_spec,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    register(LLAMA)
    register(MISTRAL)
