"""Megatron's GPT model in general: whatever no named family describes.

Such a checkpoint moves between Megatron layouts; it has no Hugging Face form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ckptx.errors import SchemaError
from ckptx.model.layout import Family
from ckptx.model.spec import ModelSpec
from ckptx.protocol.hookspecs import hookimpl
from ckptx.schemas.conventions.legacy import LEGACY
from ckptx.schemas.conventions.mcore import MCORE


def _no_config(_: Mapping[str, Any] | ModelSpec) -> NoReturn:
    raise SchemaError("a general Megatron GPT model has no Hugging Face config")


GPT = Family(
    name="gpt",
    architectures=("GPTModel",),
    model_types=(),
    layouts={**MCORE, "legacy": LEGACY},
    from_config=_no_config,
    to_config=_no_config,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    """Register the family of this module."""
    register(GPT)
