"""GLM-4-0414 (``Glm4ForCausalLM``), as Hugging Face names it: GLM-4 with two more norms a layer.

Source: huggingface/transformers src/transformers/models/glm4/*.py @ v5.23.0.
"""

from dataclasses import replace

from ckptx.schemas.conventions.blocks import hf_fused_gated_mlp, layer_norms
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.glm import TABLE

_NORMS = {
    "input norm": "input_layernorm",
    "post norm": "post_attention_layernorm",
    "attention output norm": "post_self_attn_layernorm",
    "mlp output norm": "post_mlp_layernorm",
}
FAMILY = decoder_family(
    "glm4",
    replace(TABLE, architecture="Glm4ForCausalLM"),
    mlp=hf_fused_gated_mlp,
    norms=layer_norms(_NORMS),
    refused=not_in_megatron("norm of what attention and MLP return"),
)
