"""GPT-2, as Hugging Face names it.

Its ``Conv1D`` stores every matrix as [in, out]; query, key and value are one tensor, one after
another. The first checkpoints are without ``transformer.`` and hold masks as buffers.

Source: huggingface/transformers src/transformers/models/gpt2/modeling_gpt2.py,
src/transformers/pytorch_utils.py Conv1D @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, Section, rule
from ckptx.model.transforms import FUSED_QKV, IDENTITY, Transform, Transposed
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import norm, untied
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE

_LAYER = "transformer.h.{layer}."
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def _stored(key: str, name: str, transform: Transform = IDENTITY) -> Rule:
    """Return a rule that finds a tensor with ``transformer.`` and without."""
    return rule(key, name, transform, also=[name.removeprefix("transformer.")])


def _linear(key: str, name: str, transform: Transform = IDENTITY) -> tuple[Rule, Rule]:
    return (
        _stored(f"{key} weight", f"{_LAYER}{name}.weight", Transposed(transform)),
        _stored(f"{key} bias", f"{_LAYER}{name}.bias", transform),
    )


def _norm(key: str, name: str) -> tuple[Rule, ...]:
    return tuple(_stored(r.keys[0], r.spellings[0].names[0]) for r in norm(key, name))


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    layouts={
        "hf": Layout(
            "hf/gpt2",
            (
                Section(
                    "embeddings",
                    (
                        _stored("word embeddings", "transformer.wte.weight"),
                        _stored("position embeddings", "transformer.wpe.weight"),
                    ),
                ),
                Section(
                    "transformer layer {layer}",
                    (
                        *_norm("input norm", f"{_LAYER}ln_1"),
                        *_linear("qkv", "attn.c_attn", FUSED_QKV),
                        *_linear("dense", "attn.c_proj"),
                        *_norm("post norm", f"{_LAYER}ln_2"),
                        *_linear("mlp l0", "mlp.c_fc"),
                        *_linear("mlp l1", "mlp.c_proj"),
                    ),
                ),
                Section("final norm", _norm("", "transformer.ln_f")),
                Section("output layer", (rule("weight", "lm_head.weight", when=untied),)),
            ),
            _BUFFERS,
        ),
        **MCORE,
        "legacy": LEGACY,
    },
    from_config=partial(spec_from_config, family="gpt2"),
    to_config=config_from_spec,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(GPT2)
