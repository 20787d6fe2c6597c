"""Gemma 2, as Hugging Face names it; it norms what attention and MLP return besides.

Source: huggingface/transformers src/transformers/models/gemma2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Layout, Rule, rule
from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.conventions.blocks import hf_decoder
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


def _norms(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("input norm weight", f"{prefix}input_layernorm.weight"),
        rule("attention output norm weight", f"{prefix}post_attention_layernorm.weight"),
        rule("post norm weight", f"{prefix}pre_feedforward_layernorm.weight"),
        rule("mlp output norm weight", f"{prefix}post_feedforward_layernorm.weight"),
    )


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
        passthrough_keys={
            "query_pre_attn_scalar": None,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
    ),
    Layout("hf/gemma2", hf_decoder(norms=_norms)),
    refused=not_in_megatron("norm of what attention and MLP return, and no soft cap on logits"),
)
