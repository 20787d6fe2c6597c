"""OLMoE, as Hugging Face names it; it normalises query and key as wholes.

Source: huggingface/transformers src/transformers/models/olmoe/*.py @ v5.23.0.
"""

from ckptx.schemas.config.experts import Mixture
from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import hf_attention_whole_norms
from ckptx.schemas.conventions.hf_experts import mixture
from ckptx.schemas.decoder import MEGATRON, decoder_family

_DEFAULTS = llama_defaults(
    vocab=50304, hidden=2048, ffn=2048, layers=16, heads=16, positions=4096, rms_norm_eps=1e-5
)

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
