"""StarCoder2, as Hugging Face names it.

Source: huggingface/transformers src/transformers/models/starcoder2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Layout, Rule, rule
from ckptx.schemas.config.traits import GELU, ConfigTable
from ckptx.schemas.conventions.blocks import hf_decoder, mlp_bias
from ckptx.schemas.decoder import decoder_family

_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def _mlp(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("mlp l0 weight", f"{prefix}mlp.c_fc.weight"),
        rule("mlp l0 bias", f"{prefix}mlp.c_fc.bias", when=mlp_bias),
        rule("mlp l1 weight", f"{prefix}mlp.c_proj.weight"),
        rule("mlp l1 bias", f"{prefix}mlp.c_proj.bias", when=mlp_bias),
    )


FAMILY = decoder_family(
    "starcoder2",
    ConfigTable(
        "Starcoder2ForCausalLM",
        _DEFAULTS,
        ("use_bias",),
        windows="all layers",
        names={"head_dim": None, "rms_norm_eps": "norm_epsilon"},
        normalization="LayerNorm",
        harmless={"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True},
        activations={name: GELU[name] for name in ("gelu_pytorch_tanh", *GELU)},
    ),
    Layout("hf/starcoder2", hf_decoder(mlp=_mlp), ("rotary_emb.inv_freq",)),
    recognition=100,
)
