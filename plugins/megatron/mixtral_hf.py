"""Load a Mixtral with the options of Megatron's loader ``mixtral_hf``.

The weights are read by the loader ``hf``; what is here is Megatron's command line.

Source: NVIDIA/Megatron-LM tools/checkpoint/loader_mixtral_hf.py @ core_v0.12.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.errors import SchemaError
from ckptx.plugins.huggingface.loader import HfLoader
from ckptx.plugins.megatron.llama_mistral import with_vocabulary
from ckptx.plugins.megatron.options import tokenizer_model_option, vocabulary_options
from ckptx.protocol.contracts import Loader
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message

FAMILY = "mixtral"


class MixtralHfLoader:
    """Reads what the loader ``hf`` reads, and nothing but Mixtral."""

    name = "mixtral_hf"
    capabilities: Mapping[str, Any] = {
        "formats": ["as loader hf"],
        "layouts": [],
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return Megatron's options."""
        return [*vocabulary_options(), tokenizer_model_option()]

    def detect(self, source: Path) -> bool:
        """Return False: what it reads is detected as ``hf``."""
        return False

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model, after checking that it is a Mixtral."""
        messages = HfLoader().load(source, options)
        begin = next(messages)
        spec = begin.parts.get("language") if isinstance(begin, Begin) else None
        if not isinstance(begin, Begin) or spec is None or spec.family != FAMILY:
            found = spec.architecture if spec else "of an unknown architecture"
            raise SchemaError(f"{source}: the model is {found}, not a Mixtral; use --loader hf")
        yield with_vocabulary(begin, options)
        yield from messages


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(MixtralHfLoader())
