"""Load a checkpoint of a legacy Megatron model, one from before Megatron Core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.errors import FormatError, SchemaError
from ckptx.model.layout import Layout
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import directory, per_rank
from ckptx.plugins.megatron.core_loader import CoreLoader, found_form
from ckptx.plugins.megatron.forms import LEGACY
from ckptx.plugins.megatron.options import LEGACY_CAPABILITIES
from ckptx.plugins.megatron.source import Source
from ckptx.protocol.contracts import Loader
from ckptx.protocol.hookspecs import hookimpl
from ckptx.registry.families import family_named
from ckptx.schemas.conventions import legacy


class LegacyLoader(CoreLoader):
    """Reads per-rank files of any ``checkpoint_version``, in old spellings and new."""

    name = "legacy"
    capabilities: Mapping[str, Any] = LEGACY_CAPABILITIES

    def options(self) -> list[click.Option]:
        """Return those of the core loader, and one that Megatron has and ckptx does not need."""
        return [
            *super().options(),
            click.Option(
                ["--position-embedding-type"],
                type=click.Choice(["learned_absolute", "rope"]),
                help="Accepted for Megatron's sake: the checkpoint's args say it.",
            ),
        ]

    def detect(self, source: Path) -> bool:
        """Return whether the files of ranks hold a legacy model."""
        return directory.looks_like(source) and found_form(source) is LEGACY

    def read(self, place: directory.IterationDirectory) -> Source:
        """Read the pickles of every rank.

        Raises:
            FormatError: the checkpoint is none of ranks, or its files do not belong together.
        """
        if place.format != "torch":
            raise FormatError(
                f"{place.path}: legacy Megatron models lie in mp_rank_* directories; this is "
                f"{place.format}: use --loader core (--from core)"
            )
        return per_rank.read(place, LEGACY, legacy.completed)

    def layout(self, checkpoint: Source, spec: ModelSpec) -> Layout:
        """Return how a model is named and ordered in files of this version."""
        layout = family_named(spec.family).layout("legacy")
        try:
            return legacy.ordered(layout, checkpoint.version, spec)
        except SchemaError as error:
            raise SchemaError(f"{checkpoint.files[0]}: {error}") from error

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return what legacy models compute otherwise than the args say."""
        return [*legacy.notes(spec), *family_named(spec.family).megatron.head_notes(spec)]


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(LegacyLoader())
