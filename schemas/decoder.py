"""A family of decoders: what an author gives, and the layouts that conventions add to it.

FAMILY = decoder_family(
    "mistral",
    ConfigTable("MistralForCausalLM", {**LLAMA_DEFAULTS, ...}, windows="all layers"),
)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.model.family import Family
from ckptx.model.layout import Layout
from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.config.translate import TableConfig
from ckptx.schemas.conventions import blocks
from ckptx.schemas.conventions.blocks import Block
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE

MEGATRON: Mapping[str, Layout] = {**MCORE, "legacy": LEGACY}
"""The layouts that Megatron has for every decoder, by convention."""


def decoder_family(
    name: str,
    table: ConfigTable,
    hf: Layout | None = None,
    *,
    attention: Block = blocks.hf_attention,
    mlp: Block = blocks.hf_gated_mlp,
    norms: Block = blocks.hf_norms,
    ignored: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    more: Mapping[str, Layout] | None = None,
    model_types: tuple[str, ...] = (),
    **others: Any,
) -> Family:
    """Return a family of decoders, with Megatron's layouts.

    Args:
        name: the family, which is the ``model_type`` of its configs.
        table: how its config reads; names its class.
        hf: the names of Hugging Face's files; Llama's if it is not given.
        attention: the attention of a layer in these files, where it is not Llama's.
        mlp: its MLP, or mixture.
        norms: its norms.
        ignored: endings of names in the files that carry no weights.
        refused: Megatron's conventions that the family cannot have, and why.
        more: layouts of further conventions.
        model_types: other values of ``model_type`` that configs have.
        others: fields of `Family`.
    """
    refused = refused or {}
    return Family(
        name=name,
        architectures=(table.architecture,),
        model_types=(name, *model_types),
        layouts={
            "hf": hf or Layout(f"hf/{name}", blocks.hf_decoder(attention, mlp, norms), ignored),
            **{kind: layout for kind, layout in MEGATRON.items() if kind not in refused},
            **(more or {}),
        },
        config=TableConfig(name, table),
        refused=refused,
        **others,
    )
