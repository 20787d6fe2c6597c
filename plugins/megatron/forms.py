"""The two kinds of models that lie in per-rank files: Megatron Core's, and the legacy ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptx.model.layout import Layout
from ckptx.plugins.megatron.adapters import unwrapped
from ckptx.schemas.conventions import legacy


@dataclass(frozen=True, slots=True)
class Generation:
    """How a kind of model lies in a rank's ``model``."""

    name: str
    """The loader and the saver of such files."""
    meaning: str
    """What it is, in messages."""
    tied_copy: Callable[[Layout], str]
    """Returns the name of the copy of tied embeddings on the last of several stages."""
    named: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns the content of ``model`` by name."""
    stored: Callable[[dict[str, Any]], dict[str, Any]]
    """Returns the content of ``model``, given by name."""


def _output_weight(layout: Layout) -> str:
    return layout.names_of("output layer", "weight")[0]


def _head_copy(_: Layout) -> str:
    return legacy.TIED_COPY


CORE = Generation("core", "a model of Megatron Core", _output_weight, unwrapped, dict)
LEGACY = Generation(
    "legacy", "a legacy Megatron model", _head_copy, legacy.flattened, legacy.nested
)


def form_of(model: Mapping[str, Any]) -> Generation:
    """Return which of the two a rank's ``model`` is."""
    return LEGACY if legacy.is_legacy(model) else CORE
