"""Save the LoRA adapter of a training checkpoint as peft does, without its base.

Source: huggingface/peft src/peft/peft_model.py, save_pretrained @ v0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from ckptx.adapters import FILES, LAYOUT
from ckptx.containers import safetensors
from ckptx.errors import SchemaError
from ckptx.hookspecs import hookimpl
from ckptx.loading import main_dtype
from ckptx.plan import SavePlan, literal_files
from ckptx.plugin import Saver
from ckptx.plugins.saver_hf import in_library_order
from ckptx.protocol import Message
from ckptx.saving import collect


class PeftSaver:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads."""

    name = "peft"
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
