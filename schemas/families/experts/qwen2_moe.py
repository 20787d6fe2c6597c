"""Qwen 2 with experts, as Hugging Face names it; one of them is for every token, with a gate.

Source: huggingface/transformers src/transformers/models/qwen2_moe/*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.model.layout import Rule, rule
from ckptx.schemas.config.experts import Mixture
from ckptx.schemas.config.traits import Biases, ConfigTable
from ckptx.schemas.conventions.blocks import moe, shared_gate
from ckptx.schemas.conventions.hf_experts import qwen_experts, shared_expert
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.qwen2 import DEFAULTS as QWEN2

DEFAULTS = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
"""Defaults of the keys for which layers are mixtures, and how."""


class _Mixture(Mixture):
    def prepared(self, values: Mapping[str, Any], family: str) -> dict[str, Any]:
        """Return the config completed, with the layers that have a window spelt out."""
        found = super().prepared(values, family)
        if not found.get("use_sliding_window") or found.get("layer_types"):
            return found
        inside = (
            layer % 2 == 0 and layer < found["max_window_layers"]
            for layer in range(found["num_hidden_layers"])
        )
        types = ["sliding_attention" if one else "full_attention" for one in inside]
        return found | {"layer_types": types}


def _experts(prefix: str) -> tuple[Rule, ...]:
    own = f"{prefix}mlp.shared_expert"
    gate = rule("shared gate weight", f"{own}_gate.weight", when=shared_gate, layers=moe)
    return (*qwen_experts(prefix), *shared_expert(f"{own}."), gate)


FAMILY = decoder_family(
    "qwen2_moe",
    ConfigTable(
        "Qwen2MoeForCausalLM",
        DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
        experts=_Mixture(
            SPARSE
            | {
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
            },
            shared=True,
            only={"qkv_bias": True},
        ),
    ),
    mlp=_experts,
    refused={"legacy": NOT_LEGACY["experts"]},
    recognition=20,
)
