"""Granite, as Hugging Face names it: Llama with four factors that Megatron does not have.

Source: huggingface/transformers src/transformers/models/granite/*.py @ v5.23.0.
"""

from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.traits import LLAMA_DEFAULTS, ConfigTable
from ckptx.schemas.decoder import decoder_family

_FACTORS = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
_ATTENTION = "attention_multiplier"


def _usual_attention(spec: ModelSpec) -> float:
    """Return the factor of attention scores that Megatron computes with."""
    return float(spec.kv_channels**-0.5)


FAMILY = decoder_family(
    "granite",
    ConfigTable(
        "GraniteForCausalLM",
        LLAMA_DEFAULTS | _FACTORS | {_ATTENTION: 1.0},
        ("attention_bias", "mlp_bias"),
        names={"head_dim": None},
        passthrough_keys={**_FACTORS, _ATTENTION: _usual_attention},
        megatron_lacks={
            **dict.fromkeys(_FACTORS, "Megatron's GPT model has no such factor"),
            _ATTENTION: "Megatron divides attention scores by the square root of the head size",
        },
    ),
    limits=("to Megatron with neutral multipliers only; Granite 3 has others",),
)
