"""GLM-4 (``GlmForCausalLM``), as Hugging Face names it.

Gate and up are one tensor; half of every head is rotated, in pairs of neighbours, as Megatron does
with ``rotary_interleaved``.

Source: huggingface/transformers src/transformers/models/glm/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import SWITCHES, Biases, ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import hf_fused_gated_mlp
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.decoder import decoder_family

TABLE = ConfigTable(
    "GlmForCausalLM",
    llama_defaults(vocab=151552, ffn=13696, layers=40, groups=2, positions=131072)
    | {"head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True},
    ("attention_bias",),
    switches={**SWITCHES, "attention_bias": Biases(qkv=True)},
    rotary_percent=0.5,
    fixed={"rotary_interleaved": True},
)
FAMILY = decoder_family(
    "glm", TABLE, mlp=hf_fused_gated_mlp, refused={"legacy": NOT_LEGACY["rotary"]}, recognition=130
)
