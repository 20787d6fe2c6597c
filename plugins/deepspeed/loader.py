"""Load a checkpoint of DeepSpeed: ZeRO stages 0 to 3 of any number of ranks, and universal ones.

Models that AutoTP has split, a PipelineModule and DeepSpeed's own mixtures of experts among them.

Weights are the fp32 masters of the optimizer, put together from the ranks' pieces; names are those
of the module that was given to ``deepspeed.initialize``: Hugging Face's.

Source: deepspeedai/DeepSpeed deepspeed/runtime/engine.py @ v0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import EnumValue
from ckptx.conversion.options import option, switch
from ckptx.errors import CkptxError, FormatError
from ckptx.hf_models.directory import base_sidecars, training_state
from ckptx.hf_models.lora.extract import FILES, adapter_options
from ckptx.hf_models.lora.names import is_lora
from ckptx.hf_models.weights import INDEXES, SINGLES, base_tensors, read_weights
from ckptx.hf_models.wrappers import file_names, name_options
from ckptx.plugins.deepspeed import directory, ranks, weights
from ckptx.plugins.megatron.legacy import LegacyLoader
from ckptx.plugins.pytorch import containers
from ckptx.plugins.pytorch.module_names import (
    nearest_config,
    shapes_of_config,
    trained_messages,
)
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.from_names import inventory
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Messages
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor, Shape, Stored

_CONSUMED = {
    *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "dp_world_size", "mp_world_size", "num_experts"),
    *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "ds_autoep_layers"),
    "universal_checkpoint_info",
}
"""What the model states say about the weights; all else is the state of the training."""
_PIECES = {
    *("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups", "fp32_groups_flat"),
    *("zero_stage", "partition_count", "group_paddings", "param_alignment_paddings"),
    *("param_slice_mappings", "ds_version"),
}
"""What the optimizer states say about the weights."""


class DeepspeedLoader:
    """Reads the pieces where they lie; nothing is gathered, no process group, no model."""

    name = "deepspeed"

    def options(self) -> list[click.Option]:
        """Return the options for the tag, for which weights are taken, and for adapters."""
        weights = "The optimizer's fp32 weights, or those that the module computes with."
        trained = "Take only what was trained; without --fill-from-base that is no whole model."
        layers = "JSON file with the names of a PipelineModule's layers.  [from the config]"
        return [
            option("--tag -t", str, "Checkpoint below SRC.  [what 'latest' says]"),
            containers.container_option(),
            option("--weights", click.Choice(["master", "module"]), weights, "master"),
            *name_options(),
            switch("--exclude-frozen-parameters", trained),
            *adapter_options(),
            option("--layer-map", click.Path(exists=True, dir_okay=False), layers),
        ]

    def detect(self, source: Location) -> bool:
        """Return whether there are DeepSpeed's model states, here or in a tag below."""
        if not source.is_dir() or not (directory.is_tag(source) or directory.tags(source)):
            return False
        # Beside whole weights, those of less than the whole are for who asks for them.
        return not _beside(source) or _is_whole(source)

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; names that no schema knows pass through."""
        masters = (options.get("weights") or "master") == "master"
        tag = directory.find(source, options.get("tag"))
        if _is_legacy(tag):
            yield from LegacyLoader().load(tag, {}, context)
            return
        if (container := options.get("container")) not in (None, "module"):
            yield from _of_container(tag, str(container), options, context)
            return
        masters = masters and container is None
        saved = directory.read(tag, masters)
        # What is converted to another dtype anyway need not have one dtype before.
        widen = context.dtype is None
        prefixes = (*(options.get("strip_prefix") or ()), *(options.get("prefix") or ()))
        trained = bool(options.get("exclude_frozen_parameters"))
        if trained and not masters:
            raise FormatError("--exclude-frozen-parameters is about masters: no --weights module")
        small = {**nearest_config(saved.directory), **base_sidecars(context)}
        try:
            shapes = _shapes(saved, small, "".join(prefixes), context)
            layer_map = options.get("layer_map")
            found = ranks.gathered(saved, masters, widen, shapes, layer_map, not trained)
            left = _left(saved)
        except RecursionError as error:
            raise FormatError(f"{source}: its objects are nested too deeply") from error
        found.tensors, renamed = file_names(found.tensors, {"strip_prefix": prefixes}, source)
        files = list(saved.files)
        filled, remarks = _of_base(files, found.tensors, context)
        found.declare("base", filled)
        found.tensors |= weights.widened(filled) if masters and widen else filled
        if trained and found.frozen and not filled:
            small = {}  # a config would say that this is the whole model
            remarks = (*remarks, "only what was trained is here, so no config was written beside")
        steps = saved.ranks[0].model.get("global_steps")
        begin = Begin(
            format=self.name,
            files=tuple(map(str, files)),
            sources=tuple(found.sources),
            root=str(saved.directory),
            sidecars=small,
            training={"iteration": "release", "global_steps": steps},
            parallel=_parallel_sizes(saved),
        )
        notes = (*found.notes, *renamed, *remarks)
        root = saved.directory.parent  # what a trainer has left beside, where the tag is its own
        beside = training_state(root) if (root / "latest").is_file() else ()
        if other := _beside(root):
            taken = "fp32 masters" if masters else "weights of the module"
            by = "peft" if other in FILES else "hf"
            notes += (f"the {taken} are converted; {other} beside is for --from {by}",)
        end = End((*found.dropped, *left, *beside), notes)
        yield from trained_messages(begin, found.tensors, end, options, context)


def _of_base(
    files: list[Location], tensors: Mapping[str, LazyTensor], context: Context
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Return the tensors that ``--hf-base`` fills in, all of them for an adapter, and remarks."""
    if context.hf_base is None or context.fill_from_base or not all(map(is_lora, tensors)):
        return base_tensors(files, tensors, context)
    filled, _ = base_tensors(files, tensors, replace(context, fill_from_base=("*",)))
    return filled, (f"all that was not trained is that of {context.hf_base}",)


def _beside(root: Location) -> str:
    """Return the name of weights that a trainer has gathered beside a checkpoint, if any."""
    names = (*INDEXES, *SINGLES, *FILES)
    return next((name for name in names if (root / name).exists()), "")


def _is_whole(root: Location) -> bool:
    """Return whether the ranks have no fewer elements than the weights beside them.

    Trainer leaves out what is frozen.
    """
    try:
        saved = directory.read(directory.find(root, None), False)
        shapes: dict[str, Any] = {}
        for rank in saved.ranks:
            model = rank.model
            frozen = model.get("frozen_param_shapes") or {}
            for group in (*(model.get("param_shapes") or ()), frozen):
                shapes |= group
            shapes |= {name: one.shape for name, one in rank.module.items() if one.numel}
        whole = sum(tensor.numel for tensor in read_weights(root).tensors.values())
    except CkptxError:
        return True  # who loads it says what is wrong
    return bool(sum(math.prod(shape) for shape in shapes.values()) >= whole)


def _of_container(tag: Location, container: str, options: Options, context: Context) -> Messages:
    """Yield the model that a trainer has saved beside DeepSpeed's own, in its ``client_state``.

    Every rank has saved it whole, so that of the first is read.

    Raises:
        FormatError: there is none of this name.
    """
    file = min(tag.glob("mp_rank_*_model_states.pt"), default=tag)
    state = torch_zip.read(file, 0)
    held = containers.state_dicts(state if isinstance(state, Mapping) else {})
    names = {path: [*map(str, one)] for path, one in held.items()}
    path, _ = containers.choose(names, container, (), tag)
    stored = {str(key): one for key, one in held[path].items() if isinstance(one, Stored)}
    tensors, remarks = file_names(stored, options, tag)
    begin = Begin(
        format="deepspeed",
        files=(str(file),),
        sources=inventory(stored),
        root=str(tag),
        sidecars={**nearest_config(tag), **base_sidecars(context)},
        training={"iteration": "release", "global_steps": state.get("global_steps")},
    )
    notes = (f"the weights are those of {path!r} in {file.name}", *remarks)
    end = End(containers.left(state, path), notes)
    yield from trained_messages(begin, tensors, end, options, context)


def _is_legacy(tag: Location) -> bool:
    """Return whether a file per rank holds the tree of a legacy Megatron model, and its args."""
    first = min(tag.glob("mp_rank_*_model_states.pt"), default=None)
    state = first and torch_zip.read(first, 0)
    return (
        isinstance(state, Mapping)
        and isinstance(state.get("module"), Mapping)
        and isinstance(state["module"].get("language_model"), Mapping)
    )


def _shapes(
    saved: directory.Saved, small: Mapping[str, bytes], prefix: str, context: Context
) -> dict[str, Shape]:
    """Return the shapes of the whole model, where ranks hold parts that may not say what of."""
    if len(saved.ranks) == 1 and not saved.layers:
        return {}
    shapes = shapes_of_config(small, saved.directory)
    place = context.hf_base or saved.directory
    if not shapes and any((place / name).is_file() for name in (*INDEXES, *SINGLES)):
        base = read_weights(place)
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    return {("" if saved.layers else prefix) + name: shape for name, shape in shapes.items()}


def _left(saved: directory.Saved) -> tuple[Dropped, ...]:
    """Return the state of the training, by name with its bytes in all ranks together."""
    sizes: dict[str, int] = {}
    states = [model for rank in saved.ranks for model in rank.models]
    optimizers = [state for rank in saved.ranks for state in rank.optimizers]
    states += [state["optimizer_state_dict"] for state in optimizers]
    states += saved.expert_optimizers
    for state in states:
        for key, value in state.items():
            if key not in _CONSUMED | _PIECES and value is not None:
                sizes.setdefault(str(key), 0)
                _add_sizes(str(key), value, sizes)
    for path in saved.skipped:
        sizes[path.name] = sizes.get(path.name, 0) + path.stat().st_size
    return tuple(Dropped(name, TRAINING_STATE, size) for name, size in sizes.items())


def _add_sizes(name: str, value: Any, sizes: dict[str, int]) -> None:
    """Add the bytes of all tensors in nested values, under the last word of their path."""
    if isinstance(value, Stored):
        sizes[name] = sizes.get(name, 0) + value.nbytes
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _PIECES:
                _add_sizes(key if isinstance(key, str) else name, item, sizes)
    elif isinstance(value, list | tuple):
        for item in value:
            _add_sizes(name, item, sizes)


def _parallel_sizes(saved: directory.Saved) -> dict[str, Any]:
    """Return the ZeRO stage as far as the files tell it, and the numbers of ranks."""
    first = saved.ranks[0]
    # ZeRO 1 and 2 are stored alike; the optimizer says which it was.
    said = (state["optimizer_state_dict"].get("zero_stage") for state in first.optimizers)
    values = (one.value if isinstance(one, EnumValue) else one for one in said)
    stage = next((one for one in values if type(one) is int), first.stage)
    sizes = {"zero_stage": stage, "world_size": first.model.get("dp_world_size")}
    return {**sizes, "mp": len(saved.ranks)} if len(saved.ranks) > 1 else sizes
