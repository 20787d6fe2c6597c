"""OLMo 2, as Hugging Face names it.

It normalises what attention and MLP return, not what they get, and query and key as wholes.

Source: huggingface/transformers src/transformers/models/olmo2/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import hf_attention_whole_norms, layer_norms
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family

_NORMS = {
    "attention output norm": "post_attention_layernorm",
    "mlp output norm": "post_feedforward_layernorm",
}
FAMILY = decoder_family(
    "olmo2",
    ConfigTable(
        "Olmo2ForCausalLM",
        llama_defaults(vocab=50304, rms_norm_eps=1e-5),
        ("attention_bias",),
        names={"head_dim": None},
    ),
    attention=hf_attention_whole_norms,
    norms=layer_norms(_NORMS),
    refused=not_in_megatron(
        "norm of what attention and MLP return, and norms query and key head by head only"
    ),
)
