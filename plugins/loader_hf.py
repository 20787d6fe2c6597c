"""Load a Hugging Face model: safetensors or ``pytorch_model*.bin``, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.hookspecs import hookimpl
from ckptx.lazy import LazyTensor
from ckptx.loading import drop_ignored, inventory, main_dtype, messages_of, passthrough, resolve_tie
from ckptx.model_directory import base_sidecars, family_of, read_config, sidecars
from ckptx.model_weights import INDEXES, SINGLES, fill_from_base, read_weights
from ckptx.plugin import Loader
from ckptx.protocol import Begin, Dropped, End, Message


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
        """Return no options: everything is read from the directory."""
        return []

    def detect(self, source: Path) -> bool:
        """Return whether there are weights under Hugging Face's file names."""
        if source.is_file():
            return source.suffix == ".safetensors"
        if any((source / name).exists() for name in (*INDEXES, *SINGLES)):
            return True
        return (source / "config.json").exists() and any(source.glob("*.safetensors"))

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; tensors of an unknown architecture pass through by name."""
        directory = source if source.is_dir() else source.parent
        weights = read_weights(source)
        filled = fill_from_base(weights, options)
        tensors = weights.tensors
        files = {**sidecars(directory), **base_sidecars(options)}
        config = read_config(files, directory)
        family = family_of(config) if config else None
        begin = Begin(
            format="hf",
            layout="hf",
            parts={},
            files=tuple(map(str, weights.paths)),
            sources=inventory(tensors),
            root=str(directory),
            sidecars=files,
            training={"iteration": "release"},
        )
        if config is None or family is None:
            named = (config or {}).get("architectures") or ["no architecture"]
            yield begin
            yield passthrough(tensors)
            note = f"{', '.join(named)}: no schema, tensors pass through by name"
            yield End(notes=(*filled, note))
            return
        spec = replace(family.from_config(config), dtype=main_dtype(tensors))
        layout = family.layout("hf")
        left: dict[str, LazyTensor] = dict(tensors)
        dropped: tuple[Dropped, ...] = drop_ignored(layout, left)
        notes: tuple[str, ...] = ()
        if spec.tied:
            tied, tie_dropped, notes = resolve_tie(
                left, "model.embed_tokens.weight", "lm_head.weight", begin.files
            )
            spec, dropped = replace(spec, tied=tied), (*dropped, *tie_dropped)
        yield replace(begin, layout=layout.name, parts={"language": spec})
        yield from messages_of(layout, left, spec)
        yield End(dropped, (*filled, *notes))


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(HfLoader())
