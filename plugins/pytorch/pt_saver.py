"""Save one ``.pt`` file that holds the state dict of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import Namespace
from ckptx.errors import SchemaError
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.plugins.pytorch.state_dict import DIRECTORY_FILE, layout_option, layout_option_value
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Dropped, Message
from ckptx.protocol.model import Model, collect, named_tensors
from ckptx.registry.families import family_named, hf_tensors
from ckptx.schemas.conventions import legacy
from ckptx.schemas.megatron_settings.args import args_from_spec
from ckptx.storage.file_plan import literal_files
from ckptx.tensors.lazy import LazyTensor

_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}


class PytorchSaver:
    """Writes a ``.pt`` file, or a directory with ``model.pt`` and the model's small files."""

    name = "pytorch"
    capabilities: Mapping[str, Any] = {
        "formats": ["torch.save"],
        "layouts": ["hf", "mcore", "legacy"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return ``--layout`` and ``--target-layout``."""
        return [
            layout_option(),
            click.Option(
                ["--target-layout"],
                type=click.Choice(["hf", "core", "legacy"]),
                help="Names in the target, where --layout is about the source.",
            ),
        ]

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return the plan of one file; a target without a file's suffix becomes a directory."""
        model = collect(messages)
        value, tensors, dropped = _state(model, options)
        target = options.get("target")
        single = target is not None and Path(target).suffix in _SUFFIXES
        name = Path(target).name if single and target is not None else DIRECTORY_FILE
        files = [torch_zip.plan_file(name, value)]
        notes: tuple[str, ...] = ()
        if single:
            left = sorted(model.begin.sidecars)
            if left:
                notes = (f"one file cannot hold {', '.join(left)}; name a directory to keep them",)
        else:
            files += literal_files(model.begin.sidecars)
        place = "{target}" if single else f"{{target}}/{DIRECTORY_FILE}"
        return SavePlan(
            files,
            single_file=single,
            dropped=dropped,
            notes=notes,
            load_hint=f'torch.load("{place}", weights_only=True)',
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )


def _state(
    model: Model, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, LazyTensor], tuple[Dropped, ...]]:
    """Return what the file holds, its tensors, and what was dropped."""
    layout = options.get("target_layout") or layout_option_value(options)
    if model.passthrough is not None:
        if layout is not None and not model.begin.layout.startswith(layout):
            raise SchemaError(
                f"tensors are named as {model.begin.layout} and no schema knows their model, so "
                f"they cannot be written as {layout}; give --hf-base with a config"
            )
        return dict(model.passthrough), model.passthrough, ()
    spec = model.spec
    family = family_named(model.family)
    if layout in ("core", "legacy") and family.composition is not None:
        raise SchemaError(
            f"a {family.name} under Megatron's names is no single state dict; use --to llava "
            "--ckpt-format torch"
        )
    if layout not in ("core", "legacy"):
        tensors, dropped = hf_tensors(model)
        return dict(tensors), tensors, dropped
    old = layout == "legacy"
    named = family.layout("legacy" if old else "mcore")
    if old:
        legacy.check(spec)
    tensors, dropped = named_tensors(model, named)
    rows = model.messages["embeddings"]["word embeddings"].shape[0]
    args = args_from_spec(
        spec,
        tp=1,
        pipeline=Pipeline(),
        padded_vocab_size=rows,
        true_vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=1,
        iteration=0,
        transformer_impl="local" if old else "transformer_engine",
        ckpt_format="torch",
        source_args=model.begin.training.get("args"),
    )
    if old:
        args |= legacy.to_args(spec)
    state = {"args": Namespace(**args), "checkpoint_version": legacy.VERSION, "iteration": 0}
    held = legacy.nested(tensors) if old else dict(tensors)
    return {**state, "model": held}, tensors, dropped


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(PytorchSaver())
