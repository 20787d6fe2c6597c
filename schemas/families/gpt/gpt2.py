"""GPT-2, as Hugging Face names it.

Its ``Conv1D`` stores every matrix as [in, out]; query, key and value are one tensor, one after
another. The first checkpoints are without ``transformer.`` and hold masks as buffers.

Source: huggingface/transformers src/transformers/models/gpt2/modeling_gpt2.py,
src/transformers/pytorch_utils.py Conv1D @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Layout, Rule, Section, rule, sections
from ckptx.model.transforms import FUSED_QKV, IDENTITY, Transform, Transposed
from ckptx.schemas.config.traits import NEW_GELU, NO_HEAD_KEYS, Biases, ConfigTable
from ckptx.schemas.conventions.blocks import linear, untied
from ckptx.schemas.decoder import decoder_family

_LAYER = "transformer.h.{layer}."
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def _linear(key: str, name: str, transform: Transform = IDENTITY) -> tuple[Rule, Rule]:
    return (
        rule(f"{key} weight", f"{_LAYER}{name}.weight", Transposed(transform)),
        rule(f"{key} bias", f"{_LAYER}{name}.bias", transform),
    )


_RULES = {
    "embeddings": (
        rule("word embeddings", "transformer.wte.weight"),
        rule("position embeddings", "transformer.wpe.weight"),
    ),
    "transformer layer {layer}": (
        *linear("input norm", f"{_LAYER}ln_1"),
        *_linear("qkv", "attn.c_attn", FUSED_QKV),
        *_linear("dense", "attn.c_proj"),
        *linear("post norm", f"{_LAYER}ln_2"),
        *_linear("mlp l0", "mlp.c_fc"),
        *_linear("mlp l1", "mlp.c_proj"),
    ),
    "final norm": linear("", "transformer.ln_f"),
}
_SECTIONS = (
    *(section.under("transformer.", "transformer.", "") for section in sections(_RULES)),
    Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
)
_ATTENTION = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    **_ATTENTION,
}
_SCALE = "Megatron scales the attention of every layer by the square root of the head size"

FAMILY = decoder_family(
    "gpt2",
    ConfigTable(
        "GPT2LMHeadModel",
        _DEFAULTS,
        fixed_biases=Biases(True, True, True),
        names={
            **NO_HEAD_KEYS,
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        normalization="LayerNorm",
        activations=NEW_GELU,
        position_embedding_type="learned_absolute",
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        passthrough_keys=_ATTENTION,
        megatron_lacks={"scale_attn_weights": _SCALE, "scale_attn_by_inverse_layer_idx": _SCALE},
    ),
    Layout("hf/gpt2", _SECTIONS, _BUFFERS),
    recognition=110,
)
