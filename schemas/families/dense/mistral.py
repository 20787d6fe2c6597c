"""Mistral, as Hugging Face names it, and as Mistral AI does, after Meta.

Source: huggingface/transformers src/transformers/models/mistral/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.conventions.meta import META, META_WIDTH
from ckptx.schemas.decoder import decoder_family

DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
FAMILY = decoder_family(
    "mistral",
    ConfigTable("MistralForCausalLM", DEFAULTS, windows="all layers"),
    ignored=("rotary_emb.inv_freq",),
    more={"meta": META, "meta-width": META_WIDTH},
    recognition=90,
)
