"""Load a Megatron LLaVA under the name and with the options of Megatron's converter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.errors import FormatError
from ckptx.plugins.megatron.core_loader import CoreLoader
from ckptx.plugins.megatron.options import CAPABILITIES
from ckptx.protocol.contracts import Loader
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message


class LlavaLoader(CoreLoader):
    """Reads what loader ``core`` reads, and nothing without a vision tower."""

    name = "llava"
    capabilities: Mapping[str, Any] = {**CAPABILITIES, "layouts": []}

    def options(self) -> list[click.Option]:
        """Return the options of loader ``core`` and Megatron's own."""
        return [
            *super().options(),
            click.Option(
                ["--vit-dummy-head-count"],
                type=click.IntRange(0),
                default=0,
                help="Heads of InternViT that count for nothing; found without it, and checked.",
            ),
        ]

    def detect(self, source: Path) -> bool:
        """Return False: what it reads is detected as ``core``."""
        return False

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model."""
        for message in super().load(source, options):
            if isinstance(message, Begin) and "vision" not in message.parts:
                raise FormatError(
                    f"{message.root}: holds no vision_model, so it is no LLaVA; use --loader core"
                )
            yield message


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(LlavaLoader())
