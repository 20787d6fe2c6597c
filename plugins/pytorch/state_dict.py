"""What the plugins for single-file state dicts share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from ckptx.schemas.conventions import legacy

DIRECTORY_FILE = "model.pt"
"""The file of a target that is a directory."""
LAYOUTS = ("auto", "hf", "core", "legacy")


def layout_option() -> click.Option:
    """Return ``--layout``: how the tensors of a ``.pt`` file are named."""
    return click.Option(
        ["--layout"],
        type=click.Choice(LAYOUTS),
        default="auto",
        show_default=True,
        help="Names in the .pt file; auto detects them, and writes Hugging Face's.",
    )


def layout_option_value(options: Mapping[str, Any]) -> str | None:
    """Return the layout that was asked for, None for ``auto``."""
    layout: str | None = options.get("layout")
    return None if layout in (None, "auto") else layout


def layout_of(names: Iterable[str]) -> str:
    """Return the layout that names follow, by the first name that only one has."""
    for name in names:
        if name.startswith(("decoder.layers.", "embedding.word_embeddings")):
            return "core"
        if legacy.names_legacy(name):
            return "legacy"
    return "hf"
