"""Qwen 2 and 2.5, as Hugging Face names them, with a bias on query, key and value alone.

Source: huggingface/transformers src/transformers/models/qwen2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.schemas.config.traits import LLAMA_DEFAULTS, Biases, ConfigTable
from ckptx.schemas.decoder import decoder_family

DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILY = decoder_family(
    "qwen2",
    ConfigTable(
        "Qwen2ForCausalLM",
        DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
        harmless={"use_mrope": False},
    ),
    recognition=70,
)
