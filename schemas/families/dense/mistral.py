"""Mistral, as Hugging Face names it, and as Mistral AI does, after Meta.

Source: huggingface/transformers src/transformers/models/mistral/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.meta import META, META_WIDTH
from ckptx.schemas.decoder import decoder_family

DEFAULTS = llama_defaults(ffn=14336, groups=8, positions=4096 * 32, sliding_window=4096)
FAMILY = decoder_family(
    "mistral",
    ConfigTable("MistralForCausalLM", DEFAULTS, windows="all layers"),
    ignored=("rotary_emb.inv_freq",),
    more={"meta": META, "meta-width": META_WIDTH},
    recognition=90,
)
