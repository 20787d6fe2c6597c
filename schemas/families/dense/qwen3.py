"""Qwen 3, as Hugging Face and torchtitan name it; it normalises every head of query and key.

Source: huggingface/transformers src/transformers/models/qwen3/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.torchtitan import TORCHTITAN_QWEN
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.qwen2 import DEFAULTS

FAMILY = decoder_family(
    "qwen3",
    ConfigTable(
        "Qwen3ForCausalLM",
        DEFAULTS | {"head_dim": 128},
        ("attention_bias",),
        qk_layernorm=True,
        windows="some layers",
    ),
    refused={"legacy": NOT_LEGACY["qk_norm"]},
    more=TORCHTITAN_QWEN,
    recognition=60,
)
