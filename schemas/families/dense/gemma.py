"""Gemma, as Hugging Face names it.

Its norms multiply by 1 + weight, as Megatron's do with ``layernorm_zero_centered_gamma``, so the
weights are the same. Embeddings are multiplied by the square root of the hidden size, which
Megatron has no switch for.

Source: huggingface/transformers src/transformers/models/gemma/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.family import MegatronModel
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.conventions.mcore import MCORE_LOCAL
from ckptx.schemas.decoder import decoder_family

DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
FIXED = {"layernorm_zero_centered_gamma": True, "scale_embeddings": True}
_NOT_LOCAL = (
    "the norms of Megatron's local spec are not zero-centred "
    "(megatron/core/transformer/torch_norm.py asserts it); write Transformer Engine's names"
)


def _scaled(spec: ModelSpec) -> list[str]:
    return [
        f"{spec.architecture} multiplies embeddings by the square root of hidden_size, "
        f"{spec.hidden_size**0.5:g}: Megatron (to core 0.16) has no setting for it; multiply "
        "the output of GPTModel.embedding in a forward hook, or logits are wrong"
    ]


FAMILY = decoder_family(
    "gemma",
    ConfigTable(
        "GemmaForCausalLM",
        DEFAULTS,
        ("attention_bias",),
        # GemmaConfig reads "gelu", a mistake of the official releases, as the tanh form.
        activations={"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"},
        fixed=FIXED,
    ),
    ignored=("rotary_emb.inv_freq",),
    refused={**dict.fromkeys(MCORE_LOCAL, _NOT_LOCAL), "legacy": NOT_LEGACY["geglu"]},
    limits=(
        "Megatron Core 0.16 has no setting for the scale of Gemma's embeddings: the model needs a "
        "forward hook, which the report names",
    ),
    megatron=MegatronModel(model_notes=_scaled),
)
