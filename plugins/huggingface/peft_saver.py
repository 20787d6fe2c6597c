"""Save the LoRA adapter of a training checkpoint as peft does, without its base.

Source: huggingface/peft src/peft/peft_model.py, save_pretrained @ v0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from ckptx.containers import safetensors
from ckptx.errors import SchemaError
from ckptx.hf_models.lora.extract import FILES, LAYOUT
from ckptx.plugins.huggingface.saver import in_library_order
from ckptx.protocol.contracts import ADAPTERS, SavePlan, Saver
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Message
from ckptx.protocol.model import collect
from ckptx.storage.file_plan import literal_files


class PeftSaver:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads."""

    name = "peft"
    wants = ADAPTERS
    capabilities: Mapping[str, Any] = {
        "formats": ["PEFT LoRA"],
        "layouts": ["peft"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return no options."""
        return []

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
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


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(PeftSaver())
