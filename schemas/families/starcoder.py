"""StarCoder2, as Hugging Face names it.

Source: huggingface/transformers src/transformers/models/starcoder2/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptx.model.layout import Family, Layout, Rule, rule
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.config.translate import config_from_spec, spec_from_config
from ckptx.schemas.conventions.blocks import hf_attention, hf_decoder, mlp_bias
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE


def _mlp(prefix: str) -> tuple[Rule, ...]:
    return (
        rule("mlp l0 weight", f"{prefix}mlp.c_fc.weight"),
        rule("mlp l0 bias", f"{prefix}mlp.c_fc.bias", when=mlp_bias),
        rule("mlp l1 weight", f"{prefix}mlp.c_proj.weight"),
        rule("mlp l1 bias", f"{prefix}mlp.c_proj.bias", when=mlp_bias),
    )


STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    layouts={
        "hf": Layout("hf/starcoder2", hf_decoder(hf_attention, _mlp), ("rotary_emb.inv_freq",)),
        **MCORE,
        "legacy": LEGACY,
    },
    from_config=partial(spec_from_config, family="starcoder2"),
    to_config=config_from_spec,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(STARCODER2)
