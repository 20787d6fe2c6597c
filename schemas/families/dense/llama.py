"""Llama, as Hugging Face names it, and as Meta and torchtitan do.

Source: huggingface/transformers src/transformers/models/llama/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.conventions.meta import META, META_WIDTH
from ckptx.schemas.conventions.torchtitan import TORCHTITAN_LLAMA
from ckptx.schemas.decoder import decoder_family

FAMILY = decoder_family(
    "llama",
    ConfigTable("LlamaForCausalLM", LLAMA_DEFAULTS, ("attention_bias", "mlp_bias")),
    # Checkpoints of 2023 hold the rotary frequencies, which are computed anew from the config.
    ignored=("rotary_emb.inv_freq",),
    more={"meta": META, "meta-width": META_WIDTH, **TORCHTITAN_LLAMA},
    recognition=80,
)
