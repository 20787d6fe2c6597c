"""Load a LoRA adapter, as peft saves it, merged into the model of ``--hf-base``.

    adapter_model.safetensors (or .bin)    adapter_config.json    [tokenizer files]

Source: huggingface/peft src/peft/peft_model.py, save_pretrained @ v0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.errors import FormatError
from ckptx.hf_models.directory import base_sidecars, hf_messages, sidecars, training_state
from ckptx.hf_models.lora import config as adapter_config
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.extract import FILES, adapter_options
from ckptx.hf_models.weights import SINGLES, Weights, read_weights
from ckptx.protocol.contracts import ADAPTERS, ANYTHING, WEIGHTS, Loader
from ckptx.protocol.from_names import inventory
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message
from ckptx.schemas.conventions import transformers_memory

_NOT_CARRIED = (ADAPTER_CONFIG, "config.json", "generation_config.json")


class PeftLoader:
    """Reads the base and the adapter where they lie; peft is not needed."""

    name = "peft"
    capabilities: Mapping[str, Any] = {
        "formats": ["PEFT LoRA"],
        "layouts": ["hf"],
        "passthrough": True,
        "lossless": False,
    }

    def options(self) -> list[click.Option]:
        """Return the options for adapters; further ones are merged after the source."""
        return adapter_options()

    def detect(self, source: Path) -> bool:
        """Return whether an adapter is there, and no whole model beside it."""
        return (
            (source / ADAPTER_CONFIG).is_file()
            and any((source / name).is_file() for name in FILES)
            and not any((source / name).is_file() for name in SINGLES)
        )

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the merged model, or the adapter alone for a target that holds adapters."""
        wants, base = options.get("wants", ANYTHING), options.get("hf_base")
        alone = wants.adapters and not (wants.weights and base is not None)
        weights = Weights([], {}, {})
        if not alone:
            if base is None:
                said = adapter_config.read(source / ADAPTER_CONFIG).said
                name = said.get("base_model_name_or_path")
                raise FormatError(
                    f"{source}: an adapter without the model that it belongs to"
                    f"{f' ({name})' if name else ''}; give its directory with --hf-base"
                )
            weights = read_weights(Path(base))
        own = {name: data for name, data in sidecars(source).items() if name not in _NOT_CARRIED}
        own = {name: data for name, data in own.items() if not name.startswith("training_args")}
        notes = (f"{', '.join(sorted(own))} came with the adapter",) if own else ()
        begin = Begin(
            format=self.name,
            layout="hf",
            parts={},
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(base if base is not None else source),
            sidecars={**base_sidecars(options), **own},
            training={"iteration": "release"},
        )
        every = {
            **options,
            "wants": ADAPTERS if alone else WEIGHTS,
            "adapter": (source, *(options.get("adapter") or ())),
        }
        dtype, beside = options.get("dtype"), training_state(source)
        yield from hf_messages(
            *(begin, weights.tensors, notes, dtype, beside, every), transformers_memory.renamer
        )


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(PeftLoader())
