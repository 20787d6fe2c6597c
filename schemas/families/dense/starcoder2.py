"""StarCoder2, as Hugging Face names it.

Source: huggingface/transformers src/transformers/models/starcoder2/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Rule
from ckptx.schemas.config.traits import GELU, ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import linear, mlp_bias
from ckptx.schemas.decoder import decoder_family

_DEFAULTS = llama_defaults(
    vocab=49152, hidden=3072, ffn=12288, layers=30, heads=24, groups=2, positions=4096
) | {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def _mlp(prefix: str) -> tuple[Rule, ...]:
    fc, projection = (f"{prefix}mlp.{name}" for name in ("c_fc", "c_proj"))
    return (*linear("mlp l0", fc, bias=mlp_bias), *linear("mlp l1", projection, bias=mlp_bias))


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
    mlp=_mlp,
    ignored=("rotary_emb.inv_freq",),
    recognition=100,
)
