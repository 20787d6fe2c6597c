"""OLMoE, as Hugging Face names it; it normalises query and key as wholes.

Source: huggingface/transformers src/transformers/models/olmoe/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.schemas.config.experts import Mixture
from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.conventions.blocks import hf_attention_whole_norms
from ckptx.schemas.conventions.hf_experts import mixture
from ckptx.schemas.decoder import MEGATRON, decoder_family

_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

FAMILY = decoder_family(
    "olmoe",
    ConfigTable(
        "OlmoeForCausalLM",
        _DEFAULTS,
        ("attention_bias",),
        experts=Mixture(
            {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
            ffn="intermediate_size",
            spellings=("num_local_experts",),
        ),
    ),
    attention=hf_attention_whole_norms,
    mlp=mixture,
    refused=dict.fromkeys(
        MEGATRON, "Megatron Core 0.16 norms query and key head by head, OLMoE each as a whole"
    ),
)
