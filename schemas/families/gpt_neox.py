"""GPT-NeoX and Pythia, as Hugging Face names them.

``query_key_value`` holds query, key and value head by head, which is the canonical order: every
head is a query group of its own.

Source: huggingface/transformers src/transformers/models/gpt_neox/modeling_gpt_neox.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Predicate, Rule, Section, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import dense_bias, mlp_bias, norm, qkv_bias, untied
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE

_LAYER = "gpt_neox.layers.{layer}."
# Checkpoints of transformers before 4.31 hold masks and rotary frequencies.
_BUFFERS = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def _linear(key: str, name: str, bias: Predicate) -> tuple[Rule, Rule]:
    return (
        rule(f"{key} weight", f"{_LAYER}{name}.weight"),
        rule(f"{key} bias", f"{_LAYER}{name}.bias", when=bias),
    )


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    layouts={
        "hf": Layout(
            "hf/gpt_neox",
            (
                Section("embeddings", (rule("word embeddings", "gpt_neox.embed_in.weight"),)),
                Section(
                    "transformer layer {layer}",
                    (
                        *norm("input norm", f"{_LAYER}input_layernorm"),
                        *norm("post norm", f"{_LAYER}post_attention_layernorm"),
                        *_linear("qkv", "attention.query_key_value", qkv_bias),
                        *_linear("dense", "attention.dense", dense_bias),
                        *_linear("mlp l0", "mlp.dense_h_to_4h", mlp_bias),
                        *_linear("mlp l1", "mlp.dense_4h_to_h", mlp_bias),
                    ),
                ),
                Section("final norm", norm("", "gpt_neox.final_layer_norm")),
                Section(
                    "output layer",
                    # In memory transformers 5 calls it lm_head, in files it does not.
                    (rule("weight", "embed_out.weight", when=untied, also=["lm_head.weight"]),),
                ),
            ),
            _BUFFERS,
        ),
        **MCORE,
        "legacy": LEGACY,
    },
    from_config=partial(spec_from_config, family="gpt_neox"),
    to_config=config_from_spec,
    limits=(
        "to Megatron with `use_parallel_residual` false only; Pythia and GPT-NeoX-20B have it "
        "true, which Megatron Core 0.16 cannot compute",
    ),
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(GPT_NEOX)
