"""Qwen 3 with experts, as Hugging Face names it.

Source: huggingface/transformers src/transformers/models/qwen3_moe/*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.experts import Mixture
from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.conventions.hf_experts import qwen_experts
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.experts.qwen2_moe import DEFAULTS, SPARSE


class _Mixture(Mixture):
    def prepared(self, values: Mapping[str, Any], family: str) -> dict[str, Any]:
        """Return the config completed, without a window that is switched off."""
        found = super().prepared(values, family)
        return found if found.get("use_sliding_window") else found | {"sliding_window": None}

    def settings(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys that the config has for the experts of a spec, and the window's."""
        windowed = spec.extra.get("sliding_window") is not None
        return super().settings(spec) | {"use_sliding_window": windowed}


FAMILY = decoder_family(
    "qwen3_moe",
    ConfigTable(
        "Qwen3MoeForCausalLM",
        DEFAULTS | {"intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4},
        ("attention_bias",),
        qk_layernorm=True,
        windows="all layers",
        experts=_Mixture(
            SPARSE | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            spellings=("num_local_experts",),
        ),
    ),
    mlp=qwen_experts,
    refused={"legacy": NOT_LEGACY["experts"]},
    recognition=10,
)
