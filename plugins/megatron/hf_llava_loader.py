"""Load a LLaVA whose tensors Megatron's converter has named for Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptx.errors import SchemaError
from ckptx.hf_models.directory import base_sidecars, sidecars
from ckptx.hf_models.weights import fill_from_base, read_weights
from ckptx.plugins.huggingface.loader import HfLoader
from ckptx.plugins.megatron.llava import FAMILY
from ckptx.protocol.contracts import Loader
from ckptx.protocol.from_names import inventory, named_messages
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import family_named
from ckptx.schemas.families.multimodal.hf_llava import parts_from
from ckptx.schemas.families.multimodal.llava import CONVERTER


class HfLlavaLoader(HfLoader):
    """Reads ``pytorch_model*.bin`` as Megatron's saver writes it, and safetensors."""

    name = "hf_llava"
    capabilities: Mapping[str, Any] = {
        "formats": ["safetensors", "pytorch_model.bin"],
        "layouts": [],
        "lossless": True,
    }

    def detect(self, source: Path) -> bool:
        """Return False: by its files it is a Hugging Face model like any other."""
        return False

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model."""
        weights = read_weights(source)
        filled = fill_from_base(weights, options)
        files = {**(sidecars(source) if source.is_dir() else {}), **base_sidecars(options)}
        config = read_config(files, source)
        files.pop(CONFIG, None)  # it is ours, or of the language model alone
        begin = Begin(
            format=self.name,
            layout=CONVERTER,
            parts={},
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(source),
            sidecars=files,
            training={"iteration": "release"},
            family=FAMILY,
        )
        try:
            parts = parts_from(config, weights.tensors)
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from error
        layout = family_named(FAMILY).layout(CONVERTER)
        yield from named_messages(begin, weights.tensors, parts, layout, filled)


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(HfLlavaLoader())
