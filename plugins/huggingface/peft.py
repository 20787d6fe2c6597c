"""LoRA adapters as peft saves them, merged into the model of ``--hf-base`` or alone.

    adapter_model.safetensors (or .bin)    adapter_config.json    [tokenizer files]

Source: huggingface/peft src/peft/peft_model.py, save_pretrained @ v0.21.2.
"""

from __future__ import annotations

from dataclasses import replace

import click

from ckptx.containers import safetensors
from ckptx.errors import FormatError, SchemaError
from ckptx.hf_models.directory import (
    base_sidecars,
    hf_messages,
    masters_beside,
    sidecars,
    training_state,
)
from ckptx.hf_models.lora import config as adapter_config
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.extract import FILES, LAYOUT, adapter_options
from ckptx.hf_models.weights import SINGLES, Weights, read_weights
from ckptx.plugins.huggingface.hf import in_library_order
from ckptx.protocol.context import ADAPTERS, UNTOLD, WEIGHTS, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import begin_anyway, inventory, main_dtype
from ckptx.protocol.messages import Begin, Messages
from ckptx.protocol.model import collect
from ckptx.schemas.conventions import transformers_memory
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location

_NOT_CARRIED = (ADAPTER_CONFIG, "config.json", "generation_config.json")


class PeftLoader:
    """Reads the base and the adapter where they lie; peft is not needed."""

    name = "peft"

    def options(self) -> list[click.Option]:
        """Return the options for adapters; further ones are merged after the source."""
        return adapter_options()

    def detect(self, source: Location) -> bool:
        """Return whether an adapter is there, and no whole model beside it."""
        return (
            (source / ADAPTER_CONFIG).is_file()
            and any((source / name).is_file() for name in FILES)
            and not any((source / name).is_file() for name in SINGLES)
        )

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the merged model, or the adapter alone for a target that holds adapters."""
        wants, base = context.wants, context.hf_base
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
            weights = read_weights(base)
        own = {name: data for name, data in sidecars(source).items() if name not in _NOT_CARRIED}
        own = {name: data for name, data in own.items() if not name.startswith("training_args")}
        notes = masters_beside(source)
        if own:
            notes += (f"{', '.join(sorted(own))} came with the adapter",)
        begin = Begin(
            format=self.name,
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(base if base is not None else source),
            sidecars={**base_sidecars(context), **own},
        )
        every = {**options, "adapter": (source, *(options.get("adapter") or ()))}
        own_context = replace(context, wants=ADAPTERS if alone else WEIGHTS)
        beside = training_state(source)
        messages = hf_messages(
            *(begin, weights.tensors, notes, beside, every, own_context),
            transformers_memory.renamer,
        )
        yield from begin_anyway(begin, messages, context)


class PeftSaver:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads."""

    name = "peft"
    wants = ADAPTERS

    def options(self) -> list[click.Option]:
        """Return no options."""
        return []

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of an adapter's directory."""
        model = collect(messages)
        if model.begin.layout != LAYOUT or model.passthrough is None:
            raise SchemaError(
                f"the source is a model ({model.begin.layout}) and not an adapter, or its loader "
                "knows none: --to peft saves the LoRA matrices of checkpoints under Hugging Face's "
                "names"
            )
        tensors = in_library_order(model.passthrough)
        files = [safetensors.plan_file(FILES[0], tensors)]
        return SavePlan(
            [*literal_files(model.begin.sidecars), *files],
            load_hint='peft.PeftModel.from_pretrained(model, "{target}")',
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )
