"""The two kinds of models that lie in per-rank files: Megatron Core's, and the legacy ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptx.model_directory import family_named
from ckptx.schema import Layout
from ckptx.schemas import legacy
from ckptx.schemas.core import TIED_COPY
from ckptx.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Form:
    """How a kind of model lies in a rank's ``model``."""

    name: str
    """The loader and the saver of such files."""
    meaning: str
    """What it is, in messages."""
    tied_copy: str
    """The copy of tied embeddings on the last of several stages."""
    named: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns the content of ``model`` by name."""
    stored: Callable[[dict[str, Any]], dict[str, Any]]
    """Returns the content of ``model``, given by name."""
    layout: Callable[[ModelSpec, float], Layout]
    """Returns the layout of a model in files of a ``checkpoint_version``."""


def _core_layout(spec: ModelSpec, _: float) -> Layout:
    return family_named(spec.family).layout("mcore")


def _legacy_layout(spec: ModelSpec, version: float) -> Layout:
    return legacy.ordered(family_named(spec.family).layout("legacy"), version, spec)


CORE = Form("core", "a model of Megatron Core", TIED_COPY, dict, dict, _core_layout)
LEGACY = Form(
    "legacy",
    "a legacy Megatron model",
    legacy.TIED_COPY,
    legacy.flattened,
    legacy.nested,
    _legacy_layout,
)


def form_of(model: Mapping[str, Any]) -> Form:
    """Return which of the two a rank's ``model`` is."""
    return LEGACY if legacy.is_legacy(model) else CORE
