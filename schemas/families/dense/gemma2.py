"""Gemma 2, as Hugging Face names it; it norms what attention and MLP return besides.

Source: huggingface/transformers src/transformers/models/gemma2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.conventions.blocks import layer_norms
from ckptx.schemas.conventions.mcore import not_in_megatron
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.gemma import DEFAULTS, FIXED

_DEFAULTS = {key: value for key, value in DEFAULTS.items() if key != "hidden_act"} | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


_NORMS = {
    "input norm": "input_layernorm",
    "attention output norm": "post_attention_layernorm",
    "post norm": "pre_feedforward_layernorm",
    "mlp output norm": "post_feedforward_layernorm",
}
_CAPS = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")

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
        passthrough_keys=dict.fromkeys(_CAPS),
    ),
    norms=layer_norms(_NORMS),
    refused=not_in_megatron("norm of what attention and MLP return, and no soft cap on logits"),
)
