"""Qwen 2, 2.5 and 3, as Hugging Face names them.

Qwen 2 has a bias on query, key and value alone, Qwen 3 normalises every head of query and key.

Source: huggingface/transformers src/transformers/models/{qwen2,qwen3}/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_decoder
from ckptx.schemas.conventions.legacy import LEGACY, NOT_LEGACY
from ckptx.schemas.conventions.mcore import MCORE
from ckptx.schemas.conventions.torchtitan import TORCHTITAN_QWEN

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    layouts={
        "hf": Layout("hf/qwen2", hf_decoder()),
        **MCORE,
        "legacy": LEGACY,
    },
    from_config=partial(spec_from_config, family="qwen2"),
    to_config=config_from_spec,
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    layouts={
        "hf": Layout("hf/qwen3", hf_decoder()),
        **MCORE,
        **TORCHTITAN_QWEN,
    },
    from_config=partial(spec_from_config, family="qwen3"),
    to_config=config_from_spec,
    refused={"legacy": NOT_LEGACY["qk_norm"]},
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the families of this module."""
    register(QWEN2)
    register(QWEN3)
