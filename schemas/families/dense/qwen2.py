"""Qwen 2 and 2.5, as Hugging Face names them, with a bias on query, key and value alone.

Source: huggingface/transformers src/transformers/models/qwen2/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import Biases, ConfigTable, llama_defaults
from ckptx.schemas.decoder import decoder_family

DEFAULTS = llama_defaults(vocab=151936, ffn=22016, groups=32, positions=32768) | {
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
