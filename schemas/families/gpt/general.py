"""Megatron's GPT model in general: whatever no named family describes.

Such a checkpoint moves between Megatron layouts; it has no Hugging Face form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ckptx.errors import SchemaError
from ckptx.model.family import LAST, Family, FamilyConfig
from ckptx.model.spec import ModelSpec
from ckptx.schemas.decoder import MEGATRON
from ckptx.schemas.families.dense import llama


class _General(FamilyConfig):
    def to_config(self, spec: ModelSpec) -> NoReturn:
        """Raise a SchemaError that says what keeps the model from being one of Llama's manner."""
        reasons = llama.FAMILY.config.unsupported(spec)
        because = f" (Llama's relatives do not have: {', '.join(reasons)})" if reasons else ""
        raise SchemaError(f"no Hugging Face family is known for this {spec.architecture}{because}")

    def merge_config(self, config: Mapping[str, Any], spec: ModelSpec) -> NoReturn:
        """Raise a SchemaError, as `to_config` does."""
        self.to_config(spec)

    def of_family(self, spec: ModelSpec) -> ModelSpec:
        """Return any spec as that of a GPT model."""
        return replace(spec, family="gpt", architecture="GPTModel")


FAMILY = Family(
    name="gpt",
    architectures=("GPTModel",),
    model_types=(),
    layouts=MEGATRON,
    config=_General(reason="a general Megatron GPT model has no Hugging Face config"),
    recognition=LAST,
)
