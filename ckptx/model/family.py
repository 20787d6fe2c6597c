"""A model family: everything that ckptx knows of one architecture, in one object.

What shared code needs to know of a family it asks of the registered `Family`; nothing else lists
families.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.layout import Layout, Parts
from ckptx.model.spec import ModelSpec
from ckptx.tensors.lazy import LazyTensor, Shape

MEGATRON_SWITCHES = (
    "layernorm_zero_centered_gamma",
    "rotary_interleaved",
    "qk_l2_norm",
    "no_rope_freq",
    "attention_output_gate",
)
"""Megatron's switches that change what weights mean; a family has each always, or never."""

FUNCTION_SETTINGS = "megatron_settings"
"""The entry of a spec's ``extra`` with the args that change what Megatron computes, by name."""

LAST = sys.maxsize
"""The `Family.recognition` of the family that is whatever no other is."""


def function_settings(spec: ModelSpec) -> str:
    """Return the args of a checkpoint that change what Megatron computes, for an error."""
    found = spec.extra.get(FUNCTION_SETTINGS, {})
    said = " and ".join(f"{name} {value!r}" for name, value in found.items())
    return f"{said} (ignored with {' '.join(f'--accept-arg {name}' for name in found)})"


def unknown_keys_said(parts: Parts) -> Iterator[str]:
    """Yield the remarks on keys of a model's config that no schema knows."""
    for spec in parts.values():
        if unknown := spec.unknown_keys:
            said = ", ".join(f"{key} {json.dumps(value):.60}" for key, value in unknown.items())
            yield (
                f"the config says {said}, which {spec.architecture} of transformers does not "
                "have: what other code makes of it is not known here"
            )


@dataclass(frozen=True)
class FamilyConfig:
    """How the ``config.json`` of a family reads, and how it is written; by itself, not at all.

    `ckptx.schemas.config.translate.TableConfig` is one that is made of a table.
    """

    reason: str = field(default="", kw_only=True)
    """Why the family has no config, or none that ckptx can translate."""

    def from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the dimensions that a config says, in any transformers version's spelling.

        Raises:
            SchemaError: it asks for what the family cannot be.
        """
        raise SchemaError(self.reason)

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return a complete ``config.json`` for a model whose own is not at hand.

        Raises:
            SchemaError: the config cannot say what the spec says.
        """
        raise SchemaError(self.reason)

    def differences(self, config: Mapping[str, Any], spec: ModelSpec) -> list[str]:
        """Return one line per key in which a config contradicts a spec."""
        raise SchemaError(self.reason)

    def merge_config(self, config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
        """Return a config in which the spec wins where both speak, and all else is left alone.

        Raises:
            SchemaError: the config cannot say what the spec says.
        """
        raise SchemaError(self.reason)

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says that the config cannot say, one reason each."""
        return []

    def unsupported_by_megatron(self, spec: ModelSpec) -> Iterable[str]:
        """Return what of the config's own keys Megatron cannot compute, one reason each."""
        return ()

    def of_family(self, spec: ModelSpec) -> ModelSpec:
        """Return a spec that Megatron's settings say as one of the family."""
        return spec


@dataclass(frozen=True, slots=True)
class Composition:
    """How the parts of a model of several parts are described together."""

    from_config: Callable[[Mapping[str, Any]], Parts]
    to_config: Callable[[Parts], dict[str, Any]]
    differences: Callable[[Mapping[str, Any], Parts], list[str]]
    """One line per key in which a config contradicts the parts."""
    merge_config: Callable[[Mapping[str, Any], Parts], dict[str, Any]]
    """Return a config in which the parts win where both speak."""
    used: Callable[[Parts], Parts]
    """Return the parts without what takes no part in the model's output."""
    completed: Callable[[Parts], tuple[Parts, Mapping[tuple[str, str], tuple[Shape, float]]]]
    """Return the parts with what a Hugging Face model must have and does not use.

    Where the parts lack it, there is a shape and a value by message and key to fill it with."""


def _nothing(spec: ModelSpec) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """What Megatron's model of a family is beyond the GPT model that its settings say."""

    script: str = "pretrain_gpt.py"
    """The script of Megatron that trains a model."""
    decoder: bool = True
    """Whether the model predicts the next token."""
    recognised: Callable[[Iterable[str]], bool] | None = None
    """Whether the names of tensors are those of this family alone."""
    from_args: Callable[[ModelSpec, Mapping[str, Any]], ModelSpec] = lambda spec, args: spec
    """Return a spec with what args say that only this family has."""
    from_weights: Callable[[ModelSpec, Mapping[str, LazyTensor]], ModelSpec] = (
        lambda spec, weights: spec
    )
    """Return a spec with what weights say that args do not."""
    to_args: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    """Return the arguments that only this family has."""
    legacy_args: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    """Return the arguments of a legacy model that are others than a GPT model's."""
    launch_flags: Callable[[ModelSpec, bool], Sequence[str]] = lambda spec, local: ()
    """Return the options of a launch that only this family needs; of the local spec if asked."""
    model_notes: Callable[[ModelSpec], list[str]] = _nothing
    """Return what Megatron must be told by hand although all weights are there."""
    head_notes: Callable[[ModelSpec], list[str]] = _nothing
    """Return what a head computes otherwise in Megatron than in transformers."""

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return what Megatron must be told by hand of a model, or computes otherwise."""
        return [*self.head_notes(spec), *self.model_notes(spec)]


@dataclass(frozen=True, slots=True)
class Family:
    """A model architecture: the layouts it has, how its config reads, what Megatron makes of it."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    layouts: Mapping[str, Layout]
    """By convention: ``"hf"``, ``"mcore"``, ``"meta"``."""
    config: FamilyConfig
    refused: Mapping[str, str] = field(default_factory=dict)
    """By convention: why the family cannot have that layout."""
    composition: Composition | None = None
    """For a model of several parts; `config` is then that of its language part."""
    limits: tuple[str, ...] = ()
    """For the support matrix: which models of the family cannot be converted, or need a hand."""
    recognition: int | None = None
    """When the family is asked whether Megatron's settings are its own, where nothing names one.

    ckptx's families come before any other, each in this order; None: it is never asked."""
    megatron: MegatronModel = field(default_factory=MegatronModel)

    def layout(self, convention: str) -> Layout:
        """Return the layout of a convention (``"hf"``, ``"mcore"``).

        Raises:
            SchemaError: the family has none.
        """
        if convention not in self.layouts:
            reason = self.refused.get(convention, "its tensors cannot be named that way")
            raise SchemaError(
                f"family {self.name} has no {convention} layout, only "
                f"{', '.join(sorted(self.layouts))}: {reason}"
            )
        return self.layouts[convention]

    def from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the dimensions of the language part that a config says."""
        return self.config.from_config(config)

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return a complete config of the language part."""
        return self.config.to_config(spec)
