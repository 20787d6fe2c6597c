"""A LLaVA under the names that Megatron's converter has for Hugging Face files."""

from __future__ import annotations

from ckptx.errors import SchemaError
from ckptx.hf_models.directory import base_sidecars, sidecars
from ckptx.hf_models.weights import fill_from_base, read_weights
from ckptx.plugins.huggingface.hf import HfLoader, HfSaver, weight_files
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import inventory, main_dtype, named_messages
from ckptx.protocol.messages import Begin, Messages
from ckptx.protocol.model import collect, leave_unused, named_tensors
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import family_named
from ckptx.schemas.families.multimodal.hf_llava import (
    check,
    config_from_parts,
    constants,
    parts_from,
)
from ckptx.schemas.families.multimodal.llava import CONVERTER
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location

FAMILY = "llava"


class HfLlavaLoader(HfLoader):
    """Reads ``pytorch_model*.bin`` as Megatron's saver writes it, and safetensors."""

    name = "hf_llava"

    def detect(self, source: Location) -> bool:
        """Return False: by its files it is a Hugging Face model like any other."""
        return False

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model."""
        weights = read_weights(source)
        filled = fill_from_base(weights, context)
        files = {**(sidecars(source) if source.is_dir() else {}), **base_sidecars(context)}
        config = read_config(files, source)
        files.pop(CONFIG, None)  # it is ours, or of the language model alone
        begin = Begin(
            format=self.name,
            layout=CONVERTER,
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(source),
            sidecars=files,
            family=FAMILY,
        )
        try:
            parts = parts_from(config, weights.tensors)
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from error
        layout = family_named(FAMILY).layout(CONVERTER)
        yield from named_messages(begin, weights.tensors, parts, layout, filled)


class HfLlavaSaver(HfSaver):
    """Writes safetensors, or as Megatron's saver ``pytorch_model*.bin``."""

    name = "hf_llava"

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of a directory with weights, and a config that ckptx reads."""
        model = collect(messages)
        if "vision" not in model.begin.parts:
            raise SchemaError("the source has no vision tower, so it is no LLaVA; use --saver hf")
        check(model.parts)
        family = family_named(FAMILY)
        unused = leave_unused(model, family)
        tensors, dropped = named_tensors(model, family.layout(CONVERTER))
        tensors |= constants(model.parts)
        files = {**model.begin.sidecars, CONFIG: dump_config(config_from_parts(model.parts))}
        return SavePlan(
            [*literal_files(files), *weight_files(tensors, options)],
            dropped=(*unused, *dropped),
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )
