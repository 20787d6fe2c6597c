"""Gemma, as Hugging Face names it.

Its norms multiply by 1 + weight, as Megatron's do with ``layernorm_zero_centered_gamma``, so the
weights are the same. Embeddings are multiplied by the square root of the hidden size, which
Megatron has no switch for.

Source: huggingface/transformers src/transformers/models/gemma/*.py @ v5.23.0.
"""

from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.mcore import not_local
from ckptx.schemas.decoder import decoder_family

DEFAULTS = llama_defaults(
    vocab=256000, hidden=3072, ffn=24576, layers=28, heads=16, groups=16, positions=8192
) | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
FIXED = {"layernorm_zero_centered_gamma": True, "scale_embeddings": True}
_NOT_LOCAL = (
    "the norms of Megatron's local spec are not zero-centred "
    "(megatron/core/transformer/torch_norm.py asserts it)"
)
FAMILY = decoder_family(
    "gemma",
    ConfigTable(
        "GemmaForCausalLM",
        DEFAULTS,
        ("attention_bias",),
        # GemmaConfig reads "gelu", a mistake of the official releases, as the tanh form.
        activations={"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"},
        fixed=FIXED,
        # GemmaConfig of transformers 4 has both, and this one wins.
        harmless={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
    ),
    ignored=("rotary_emb.inv_freq",),
    refused={**not_local(_NOT_LOCAL), "legacy": NOT_LEGACY["geglu"]},
    limits=(
        "Megatron Core 0.16 has no setting for the scale of Gemma's embeddings: the model needs a "
        "forward hook, which the report names",
    ),
)
