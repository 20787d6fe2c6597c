"""Load a Hugging Face model: safetensors or ``pytorch_model*.bin``, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.containers import dcp_safetensors
from ckptx.hf_models.directory import base_sidecars, hf_messages, sidecars, training_state
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.weights import INDEXES, SINGLES, fill_from_base, read_weights
from ckptx.protocol.contracts import Loader
from ckptx.protocol.from_names import inventory
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message
from ckptx.schemas.conventions import transformers_memory


class HfLoader:
    """Reads a model directory as transformers writes it, or one safetensors file."""

    name = "hf"
    capabilities: Mapping[str, Any] = {
        "formats": ["safetensors", "pytorch_model.bin"],
        "layouts": ["hf"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for adapters; all else is read from the directory."""
        return adapter_options()

    def detect(self, source: Path) -> bool:
        """Return whether there are weights under Hugging Face's file names."""
        if source.is_file():
            return source.suffix == ".safetensors"
        if any((source / name).exists() for name in (*INDEXES, *SINGLES)):
            return True
        if (source / ADAPTER_CONFIG).exists():
            return False  # its weights are an adapter's
        if dcp_safetensors.shards(source):
            return False
        # Mistral's own file may lie beside a config, too; it has other names.
        others = (p for p in source.glob("*.safetensors") if not p.name.startswith("consolidated"))
        return (source / "config.json").exists() and any(others)

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; tensors of an unknown architecture pass through by name."""
        directory = source if source.is_dir() else source.parent
        weights = read_weights(source)
        filled = fill_from_base(weights, options)
        begin = Begin(
            format="hf",
            layout="hf",
            parts={},
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(directory),
            sidecars={**sidecars(directory), **base_sidecars(options)},
            training={"iteration": "release"},
        )
        yield from hf_messages(
            begin,
            weights.tensors,
            filled,
            options.get("dtype"),
            training_state(directory) if source.is_dir() else (),
            options,
            transformers_memory.renamer,
        )


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(HfLoader())
