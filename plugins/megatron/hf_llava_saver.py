"""Save a LLaVA under the names that Megatron's converter has for Hugging Face files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.plugins.huggingface.saver import HfSaver, weight_files
from ckptx.plugins.megatron.llava import FAMILY
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Message
from ckptx.protocol.model import collect, leave_unused, named_tensors
from ckptx.protocol.sidecars import CONFIG, dump_config
from ckptx.registry.families import family_named
from ckptx.schemas.families.multimodal.hf_llava import check, config_from_parts, constants
from ckptx.schemas.families.multimodal.llava import CONVERTER
from ckptx.storage.file_plan import literal_files


class HfLlavaSaver(HfSaver):
    """Writes safetensors, or as Megatron's saver ``pytorch_model*.bin``."""

    name = "hf_llava"
    capabilities: Mapping[str, Any] = {
        "formats": ["safetensors", "pytorch_model.bin"],
        "layouts": [],
        "lossless": True,
    }

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
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


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(HfLlavaSaver())
