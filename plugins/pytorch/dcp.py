"""Directories of `torch.distributed.checkpoint`, as FSDP, RLinf, accelerate and others write.

A checkpoint holds a nested dictionary, flattened. The path of every entry in it is in the metadata,
so a container (``app``, ``model``) is told from the first module of a name without guessing. Names
are those of Hugging Face, with what wrappers of the model have put into them. Those that are
written are those that a model of transformers 5 has in memory, below ``--target-container``, one
chunk per tensor and shard; who loads reads of each what it needs.

Source: torch:torch/distributed/checkpoint/{metadata,default_planner,filesystem}.py @ v2.13.0;
prefixes as huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0 and RLinf/RLinf
rlinf/hybrid_engines/fsdp/ @ main write them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from ckptx.containers import dcp, dcp_safetensors
from ckptx.containers.dcp import ObjectItem, TensorItem
from ckptx.containers.dcp_metadata import METADATA_NAME, DcpMetadata
from ckptx.conversion.options import option
from ckptx.errors import FormatError
from ckptx.hf_models import float8
from ckptx.hf_models.directory import base_sidecars, tie_by_names
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.wrappers import file_names, name_options
from ckptx.plugins.pytorch import containers, module_names
from ckptx.plugins.run_directory import step_of
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import inventory, main_dtype, named_messages, tied_names
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Messages
from ckptx.protocol.model import Model, collect, named_tensors
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import (
    config_of,
    family_named,
    family_of,
    hf_tensors,
    parts_from_config,
)
from ckptx.schemas.conventions import torchtitan, transformers_memory
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

_BELOW = "pytorch_model_fsdp_0"
"""Where below a checkpoint accelerate and the Hugging Face Trainer put the model."""
_STEP = re.compile(r"step-(\d+)")
"""The directory of a step of torchtitan."""
_MEGATRON = ("decoder.layers.", "embedding.word_embeddings.")
_MEGATRON_FSDP = ("model.module.decoder.", "model.module.embedding.")

_CONTAINERS = ("fsdp_checkpoint.model.", "app.model.")
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How classes of transformers end that have an output layer."""


class DcpLoader:
    """Reads the chunks where they lie; no process group, no model."""

    name = "dcp"

    def options(self) -> list[click.Option]:
        """Return the options for the container, for names and for adapters."""
        return [containers.container_option(), *name_options(), *adapter_options()]

    def detect(self, source: Location) -> bool:
        """Return whether there is metadata, not Megatron's, or was about to be, or shards."""
        if dcp_safetensors.shards(source):
            return True
        directory = _find(source)
        known = (directory / METADATA_NAME).is_file() or _is_unfinished(directory)
        return known and not (directory / "metadata.json").exists()

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; names that no schema knows pass through."""
        if paths := dcp_safetensors.shards(source):
            yield from _of_safetensors(paths, source, options, context)
            return
        given, source = source, _find(source)
        if _is_unfinished(source):
            raise FormatError(
                f"{source}: holds .distcp files and no {METADATA_NAME}, which is written last: the "
                "save was not finished; use an earlier one"
            )
        metadata = dcp.read_metadata(source)
        _refuse_megatron(metadata, source)
        small = {**module_names.nearest_config(source), **base_sidecars(context)}
        held = _containers(metadata)
        container, said = containers.choose(
            {path: [*names.values()] for path, names in held.items()},
            options.get("container"),
            module_names.shapes_of_config(small, source),
            source,
        )
        names = held[container]
        files: list[str] = []
        stored = dcp.tensors(metadata, files, names, context.spool)
        named = {names[key]: tensor for key, tensor in stored.items()}
        weights, remarks = file_names(named, options, source)
        begin = Begin(
            format=self.name,
            files=tuple(files),
            sources=inventory(stored),
            root=str(source),
            sidecars=small,
            training={"iteration": "release", "container": container},
        )
        notes = said or ((f"the weights are those of {container!r}",) if container else ())
        end = End((*_left(metadata, names), *_around(source, given)), (*notes, *remarks))
        yield from _messages(begin, weights, end, options, context)


def _of_safetensors(
    paths: list[Location], source: Location, options: Options, context: Context
) -> Messages:
    """Yield the model that lies in shards of safetensors."""
    tensors, stored = dcp_safetensors.tensors(paths)
    begin = Begin(
        format="dcp",
        files=tuple(str(path.absolute()) for path in paths),
        sources=inventory(stored),
        root=str(source),
        sidecars={**module_names.nearest_config(source), **base_sidecars(context)},
    )
    weights, remarks = file_names(tensors, options, source)
    found = f"{len(paths)} shards were found; nothing in them says how many there are"
    yield from _messages(begin, weights, End(notes=(found, *remarks)), options, context)


def _messages(
    begin: Begin, tensors: Mapping[str, LazyTensor], end: End, options: Options, context: Context
) -> Messages:
    if torchtitan.EMBEDDING in tensors:
        return _torchtitan(begin, tensors, end)
    return module_names.trained_messages(begin, tensors, end, options, context)


def _torchtitan(begin: Begin, tensors: Mapping[str, LazyTensor], end: End) -> Messages:
    """Yield the messages of a model that has torchtitan's names.

    Raises:
        FormatError: there is no config that says which model it is.
        SchemaError: torchtitan's names of this family are not known.
    """
    config = read_config(begin.sidecars, begin.root)
    family = family_of(config) if config else None
    if config is None or family is None:
        raise FormatError(
            f"{begin.root}: has torchtitan's names ({torchtitan.EMBEDDING}), found no config of a "
            "known model that says in which order their rows are; give it with --hf-base"
        )
    layout = family.layout("torchtitan")
    parts = parts_from_config(family, config)
    training = {**begin.training, "iteration": step_of(Path(begin.root), _STEP, 0)}
    begin = replace(begin, training=training)
    yield from named_messages(begin, tensors, parts, layout, end.notes, end.dropped)


def _find(source: Location) -> Location:
    """Return the directory itself, or the one of a model below it, as frameworks name it."""
    below = source / _BELOW
    found = not (source / METADATA_NAME).is_file() and (below / METADATA_NAME).is_file()
    return below if found else source


def _around(directory: Location, given: Location) -> tuple[Dropped, ...]:
    """Return what lies beside the model's directory where one above was given."""
    if directory == given:
        return ()
    return tuple(
        Dropped(path.name, TRAINING_STATE, module_names.size_of(path))
        for path in sorted(directory.parent.iterdir())
        if path != directory and path.suffix not in (".json", ".txt", ".model", ".jinja")
    )


def _is_unfinished(source: Location) -> bool:
    """Return whether ranks have written their files, and nobody the metadata, which comes last."""
    return not (source / METADATA_NAME).exists() and any(source.glob("*.distcp"))


def _refuse_megatron(metadata: DcpMetadata, source: Location) -> None:
    """Raise where the tensors are Megatron's, which have other names and ways to lie."""
    if any(key.startswith(_MEGATRON_FSDP) for key in metadata.tensors):
        raise FormatError(f"{source}: a Megatron-FSDP checkpoint, which is not loaded yet")
    if any(key.startswith(_MEGATRON) for key in metadata.tensors):
        raise FormatError(
            f"{source}: holds Megatron's tensors and no metadata.json, which is written last: the "
            "save was not finished; use an earlier iteration"
        )


def _containers(metadata: DcpMetadata) -> dict[str, dict[str, str]]:
    """Return the containers of tensors: the keys of each, with the names that they have in it."""
    groups: dict[str, dict[str, str]] = {}
    for key in metadata.tensors:
        *container, name = metadata.planner_data.get(key) or _guessed(key)
        groups.setdefault(".".join(map(str, container)), {})[key] = str(name)
    return groups


def _guessed(key: str) -> tuple[str, ...]:
    """Return the path of a key whose metadata has none: it was saved flat."""
    for prefix in _CONTAINERS:
        if key.startswith(prefix):
            return (prefix.rstrip("."), key.removeprefix(prefix))
    first, _, rest = key.partition(".")
    return (first, rest) if first in containers.TRAINING else (key,)


def _left(metadata: DcpMetadata, taken: Mapping[str, str]) -> tuple[Dropped, ...]:
    """Return what stays behind, by the first word of its key, with its bytes."""
    sizes: Counter[str] = Counter()
    for (key, _), location in metadata.items.items():
        if key not in taken:
            sizes[key.partition(".")[0]] += location.length
    return tuple(Dropped(group, TRAINING_STATE, size) for group, size in sizes.items())


class DcpSaver:
    """Writes what ``dcp.load`` reads into an FSDP model."""

    name = "dcp"

    def options(self) -> list[click.Option]:
        """Return the options for the container and the shards."""
        container = (
            "Path of the model in the saved dictionary, as 'model' or 'app.model'.  "
            "[default: none, names stand alone]"
        )
        rows = "Files, each with a part of the rows of every tensor."
        names = (
            "Names as a model of transformers 5 has in memory, as model directories have, or as "
            "torchtitan has (0.2: up to release 0.2.2)."
        )
        known = click.Choice(["memory", "files", *torchtitan.CONVENTIONS])
        return [
            option("--target-container", str, container, "", show_default=False),
            option("--shards", click.IntRange(min=1), rows, 1),
            option("--target-names", known, names, "memory"),
        ]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of a directory."""
        model = collect(messages)
        names = options.get("target_names") or "memory"
        convention = names if names in torchtitan.CONVENTIONS else "hf"
        if convention == "hf":
            tensors, dropped = hf_tensors(model)
        else:
            tensors, dropped = named_tensors(model, family_named(model.family).layout(convention))
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
