"""GPT-NeoX and Pythia, as Hugging Face names them.

``query_key_value`` holds query, key and value head by head, which is the canonical order: every
head is a query group of its own.

Source: huggingface/transformers src/transformers/models/gpt_neox/modeling_gpt_neox.py @ v5.23.0.
"""

from ckptx.model.layout import Layout, rule, sections
from ckptx.schemas.config.traits import GELU, NO_HEAD_KEYS, Biases, ConfigTable, llama_defaults
from ckptx.schemas.conventions.blocks import dense_bias, linear, mlp_bias, norm, qkv_bias, untied
from ckptx.schemas.decoder import decoder_family

_LAYER = "gpt_neox.layers.{layer}."
# Checkpoints of transformers before 4.31 hold masks and rotary frequencies.
_BUFFERS = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
_RULES = {
    "embeddings": (rule("word embeddings", "gpt_neox.embed_in.weight"),),
    "transformer layer {layer}": (
        *norm("input norm", f"{_LAYER}input_layernorm"),
        *norm("post norm", f"{_LAYER}post_attention_layernorm"),
        *linear("qkv", f"{_LAYER}attention.query_key_value", bias=qkv_bias),
        *linear("dense", f"{_LAYER}attention.dense", bias=dense_bias),
        *linear("mlp l0", f"{_LAYER}mlp.dense_h_to_4h", bias=mlp_bias),
        *linear("mlp l1", f"{_LAYER}mlp.dense_4h_to_h", bias=mlp_bias),
    ),
    "final norm": norm("", "gpt_neox.final_layer_norm"),
    # In memory transformers 5 calls it lm_head, in files it does not.
    "output layer": (rule("weight", "embed_out.weight", when=untied, also=["lm_head.weight"]),),
}
_DEFAULTS = llama_defaults(
    vocab=50432, hidden=6144, ffn=24576, layers=44, heads=64, positions=2048
) | {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
}

FAMILY = decoder_family(
    "gpt_neox",
    ConfigTable(
        "GPTNeoXForCausalLM",
        _DEFAULTS,
        ("attention_bias",),
        fixed_biases=Biases(mlp=True),
        names={**NO_HEAD_KEYS, "rms_norm_eps": "layer_norm_eps"},
        normalization="LayerNorm",
        activations=GELU,
        rotary_percent=0.25,
        rotary_keys=("rotary_emb_base", "rotary_pct"),
        passthrough_keys={"use_parallel_residual": False},
        megatron_lacks={
            "use_parallel_residual": "Megatron's TransformerLayer (to core 0.16) adds the "
            "attention's output before the MLP, and has no parallel form"
        },
    ),
    Layout("hf/gpt_neox", sections(_RULES), _BUFFERS),
    limits=(
        "to Megatron with `use_parallel_residual` false only; Pythia and GPT-NeoX-20B have it "
        "true, which Megatron Core 0.16 cannot compute",
    ),
    recognition=120,
)
