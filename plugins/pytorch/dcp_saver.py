"""Save a directory that `torch.distributed.checkpoint` loads into a model of any sharding.

Names are those that a model of transformers 5 has in memory, below ``--target-container``. There is
one chunk per tensor and shard; who loads reads of each what it needs.

Source: torch:torch/distributed/checkpoint/{metadata,filesystem}.py @ v2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from ckptx.containers import dcp
from ckptx.containers.dcp import ObjectItem, TensorItem
from ckptx.hf_models import float8
from ckptx.hf_models.directory import tie_by_names
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.from_names import main_dtype, tied_names
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Message
from ckptx.protocol.model import Model, collect, named_tensors
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import config_of, family_named, hf_tensors
from ckptx.schemas.conventions import torchtitan, transformers_memory
from ckptx.storage.file_plan import literal_files
from ckptx.tensors.lazy import LazyTensor

_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How classes of transformers end that have an output layer."""


class DcpSaver:
    """Writes what ``dcp.load`` reads into an FSDP model."""

    name = "dcp"
    capabilities: Mapping[str, Any] = {
        "formats": ["torch.distributed.checkpoint"],
        "layouts": ["hf", "torchtitan"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for the container and the shards."""
        return [
            click.Option(
                ["--target-container"],
                default="",
                help="Path of the model in the saved dictionary, as 'model' or 'app.model'.  "
                "[default: none, names stand alone]",
            ),
            click.Option(
                ["--shards"],
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Files, each with a part of the rows of every tensor.",
            ),
            click.Option(
                ["--target-names"],
                type=click.Choice(["memory", "files", *torchtitan.CONVENTIONS]),
                default="memory",
                show_default=True,
                help="Names as a model of transformers 5 has in memory, as model directories have, "
                "or as torchtitan has (0.2: up to release 0.2.2).",
            ),
        ]

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return the plan of a directory."""
        model = collect(messages)
        names = options.get("target_names") or "memory"
        convention = names if names in torchtitan.CONVENTIONS else "hf"
        if convention == "hf":
            tensors, dropped = hf_tensors(model)
        else:
            layout = family_named(model.family).layout(convention)
            tensors, dropped = named_tensors(model, layout)
        if model.passthrough is None and model.spec.tied:
            # The state dict of a tied model has both names.
            embedding, output = tied_names(family_named(model.family).layout(convention), tensors)
            tensors[output] = tensors[embedding]
        # What is modified keeps its names, whichever they are.
        renamed = names == "memory" and "keep_container" not in model.begin.training
        tensors, notes = _in_memory(model, tensors) if renamed else (tensors, ())
        if renamed and model.passthrough is not None:
            tensors, notes = _with_output(model, tensors, notes)
        # What is modified stays in its container, unless the user says another.
        container = options.get("target_container") or model.begin.training.get("keep_container")
        path = tuple(word for word in (container or "").split(".") if word)
        shards = options.get("shards") or 1
        prefix = "".join(f"{word}." for word in path)
        files: dict[str, list[TensorItem | ObjectItem]] = {}
        for shard in range(shards):
            found = (_part(prefix + n, tensor, shards, shard) for n, tensor in tensors.items())
            files[f"__{shard}_0.distcp"] = [item for item in found if item is not None]
        paths = {prefix + name: (*path, name) for name in tensors}
        beside = model.begin.sidecars
        if CONFIG not in beside:
            beside = {**beside, **config_of(model)}
        return SavePlan(
            [*dcp.plan_directory(files, paths), *literal_files(beside)],
            dropped=dropped,
            notes=notes,
            load_hint='torch.distributed.checkpoint.load(state_dict, checkpoint_id="{target}")',
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )


def _in_memory(
    model: Model, tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors under the names that transformers 5 has in memory, and remarks."""
    files = model.begin.sidecars
    config = read_config(files if CONFIG in files else config_of(model), model.begin.root)
    if config is None:
        return tensors, ()
    if float8.KEY in config:
        return tensors, ("quantised weights keep the names of files",)
    found = transformers_memory.in_memory(tensors, config)
    return found, transformers_memory.remarks(
        *(found, tensors, config),
        changed="those of files are written with --target-names files",
        kept="those of the source are written",
    )


def _with_output(
    model: Model, tensors: dict[str, LazyTensor], notes: tuple[str, ...]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors with the output layer that a tied model without a schema has in memory."""
    config = read_config(model.begin.sidecars, model.begin.root) or {}
    classes = config.get("architectures") or ()
    tied = tie_by_names(config, tensors)
    if tied is None or tied[1] in tensors or not str(next(iter(classes), "")).endswith(_GENERATING):
        return tensors, notes
    embedding, output = tied
    kind = ".".join(embedding.rsplit(".", 2)[-2:])
    if sum(name.endswith(kind) for name in tensors) > 1:  # which of them is tied is not known
        return tensors, notes
    note = f"{output!r} is {embedding!r} once more: the model is tied, and has both in memory"
    return {**tensors, output: tensors[embedding]}, (*notes, note)


def _part(key: str, tensor: LazyTensor, shards: int, shard: int) -> TensorItem | None:
    """Return the rows that a shard holds, as `torch.chunk` cuts them; None if it has none."""
    rows = tensor.shape[0] if tensor.shape else 1
    height = -(-rows // shards)
    start, stop = min(rows, shard * height), min(rows, (shard + 1) * height)
    if start == stop and rows:
        return None
    if not tensor.shape:
        return TensorItem(key, (), (), tensor) if shard == 0 else None
    origin = (start, *(0 for _ in tensor.shape[1:]))
    return TensorItem(key, tensor.shape, origin, tensor.narrow(0, start, stop))


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(DcpSaver())
