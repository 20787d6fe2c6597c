"""Phi-3, Phi-3.5 and Phi-4, as Hugging Face names them.

Query, key and value are one tensor, one after another, and so are gate and up.

Source: huggingface/transformers src/transformers/models/phi3/modeling_phi3.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_decoder, hf_fused_attention, hf_fused_gated_mlp
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    layouts={
        "hf": Layout("hf/phi3", hf_decoder(hf_fused_attention, hf_fused_gated_mlp)),
        **MCORE,
        "legacy": LEGACY,
    },
    from_config=partial(spec_from_config, family="phi3"),
    to_config=config_from_spec,
    limits=("Megatron Core has no `longrope`: it is kept for the way back, and reported",),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(PHI3)
