"""Gemma 2, as Hugging Face names it; it norms what attention and MLP return besides.

Source: huggingface/transformers src/transformers/models/gemma2/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import layer_norms
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.gemma import FIXED

_CAPS = {
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_OWN = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_DEFAULTS = llama_defaults(
    vocab=256000, hidden=2304, ffn=9216, layers=26, heads=8, groups=4, positions=8192
) | {**_OWN, **_CAPS, "sliding_window": 4096}
_NORMS = {
    "input norm": "input_layernorm",
    "attention output norm": "post_attention_layernorm",
    "post norm": "pre_feedforward_layernorm",
    "mlp output norm": "post_feedforward_layernorm",
}
FAMILY = decoder_family(
    "gemma2",
    ConfigTable(
        "Gemma2ForCausalLM",
        _DEFAULTS,
        ("attention_bias",),
        windows="layer types",
        names={"hidden_act": "hidden_activation"},
        activations={"gelu_pytorch_tanh": "geglu_tanh"},
        fixed=FIXED,
        harmless={"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
        passthrough_keys=dict.fromkeys(_CAPS),
    ),
    norms=layer_norms(_NORMS),
    refused=not_in_megatron("norm of what attention and MLP return, and no soft cap on logits"),
)
