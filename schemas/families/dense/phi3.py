"""Phi-3, Phi-3.5 and Phi-4, as Hugging Face names them.

Query, key and value are one tensor, one after another, and so are gate and up.

Source: huggingface/transformers src/transformers/models/phi3/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import hf_fused_attention, hf_fused_gated_mlp
from ckptx.schemas.decoder import decoder_family

_DEFAULTS = llama_defaults(vocab=32064, hidden=3072, ffn=8192, positions=4096) | {
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
FAMILY = decoder_family(
    "phi3",
    ConfigTable(
        "Phi3ForCausalLM",
        _DEFAULTS,
        names={"head_dim": None},
        windows="all layers",
        rotary_percent=1.0,
        scalings={"su": "longrope", "yarn": "longrope"},
        passthrough_keys={"original_max_position_embeddings": 4096},
    ),
    attention=hf_fused_attention,
    mlp=hf_fused_gated_mlp,
    limits=("Megatron Core has no `longrope`: it is kept for the way back, and reported",),
    recognition=140,
)
