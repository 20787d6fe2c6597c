"""Load a checkpoint of RLinf, in whichever form it was saved.

    global_step_10/
        actor/
            model_state_dict/full_weights.pt        the whole model (older: full_weigths.pt)
            dcp_checkpoint/                         torch.distributed.checkpoint
            local_shard_checkpoint/                 one file per rank, see `rlinf.local_shards`
            iter_0000010/, latest_checkpointed_iteration.txt        Megatron Core's

The first of these that is there is converted, by the loader of its format.

Source: RLinf/RLinf rlinf/hybrid_engines/fsdp/strategy/base.py @ a3816b5; the folders of Megatron
from docs/source-en/rst_source/guides/resume.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import click

from ckptx.errors import FormatError, SchemaError, listing
from ckptx.hf_models import task_heads
from ckptx.hf_models.directory import base_sidecars
from ckptx.hf_models.lora import names as adapter_names
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.wrappers import file_names, name_options
from ckptx.plugins.pytorch.module_names import (
    named_as_in_files,
    nearest_config,
    others_of_step,
    shapes_of_config,
    size_of,
    trained_messages,
)
from ckptx.plugins.rlinf import local_shards
from ckptx.plugins.run_directory import ACTOR, GLOBAL_STEP, TRACKER, actor_option, step_of
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.messages import Begin, Dropped, End, Messages
from ckptx.protocol.sidecars import read_config
from ckptx.registry import registry
from ckptx.registry.families import family_of
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

_WHOLE = "model_state_dict"
_WHOLE_FILES = ("full_weights.pt", "full_weigths.pt")
_DCP = "dcp_checkpoint"


class RlinfLoader:
    """Finds the weights in a step's folder, and leaves them to the loader of their format."""

    name = "rlinf"

    def options(self) -> list[click.Option]:
        """Return the options for the model of a step, and for its names."""
        return [actor_option(), *name_options(), *adapter_options()]

    def detect(self, source: Location) -> bool:
        """Return whether a step, a model's folder in it, or what it holds has RLinf's names."""
        try:
            place, _ = _find(source, ACTOR)
        except FormatError:
            return False
        # Megatron's own directories are the core loader's, from their root on.
        return place != source or local_shards.holds_shards(source)

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; names that no schema knows pass through."""
        place, format = _find(source, options.get("actor_dir") or ACTOR)
        if format == self.name:
            yield from _from_shards(place, source, options, context)
            return
        if format == "core" and options.get("strip_prefix"):
            raise FormatError(f"{place}: --strip-prefix is not for Megatron's names")
        iteration = step_of(place.parent, GLOBAL_STEP, 2)
        left = tuple(_left(place, source))
        for message in registry.loader(format).load(place, options, context):
            if isinstance(message, Begin) and message.training.get("iteration") == "release":
                training = {**message.training, "iteration": iteration}
                message = replace(message, training=training)
            elif isinstance(message, End):
                note = f"the weights are those of {place.parent.name}/{place.name}"
                message = End((*message.dropped, *left), (note, *message.notes))
            yield message


def _find(source: Location, actor: str) -> tuple[Location, str]:
    """Return what holds the weights, and the format that it is of.

    Raises:
        FormatError: nothing does.
    """
    for directory in (source, source / actor):
        for folder in (directory / _WHOLE, directory):
            whole = next((folder / n for n in _WHOLE_FILES if (folder / n).is_file()), None)
            if whole is not None:
                return whole, "pytorch"
        if (directory / _DCP / ".metadata").is_file():
            return directory / _DCP, "dcp"
        for folder in (directory / local_shards.FOLDER, directory):
            if local_shards.holds_shards(folder):
                return folder, "rlinf"
        if directory != source and (directory / TRACKER).is_file():
            return directory, "core"
    raise FormatError(
        f"{source}: holds none of {_WHOLE}/{_WHOLE_FILES[0]}, {_DCP}, {local_shards.FOLDER} and "
        f"Megatron's {TRACKER}, and neither does {source / actor}; give a step that RLinf has "
        "saved, or say which model with --actor-dir"
    )


def _from_shards(
    directory: Location, source: Location, options: Options, context: Context
) -> Messages:
    stored, sources, files, dropped = local_shards.read(directory)
    sidecars = {**nearest_config(directory), **base_sidecars(context)}
    config = read_config(sidecars, directory)
    if len(files) > 1 and (config is None or family_of(config) is None):
        raise SchemaError(
            f"{directory}: local shards do not say how long whole tensors are; give --hf-base with "
            "a config of a known architecture, or convert dcp_checkpoint or "
            f"{_WHOLE}/{_WHOLE_FILES[0]}"
        )
    tensors, remarks = file_names(stored, options, directory)
    begin = Begin(
        format="rlinf",
        files=files,
        sources=sources,
        root=str(directory),
        sidecars=sidecars,
        training={"iteration": step_of(directory.parent, GLOBAL_STEP, 2)},
    )
    confirmed = config is not None and family_of(config) is not None
    sure = "the config of the model confirms their sizes"
    sizes = sure if confirmed else "nothing says whether there were more"
    joined = f"{len(files)} local shards were joined as RLinf's FSDP cuts them; {sizes}"
    notes = (joined, *remarks)
    end = End((*dropped, *_left(directory, source)), notes)
    try:
        if confirmed:
            _check_sizes(tensors, sidecars, directory)
        yield from trained_messages(begin, tensors, end, options, context)
    except SchemaError as error:
        raise SchemaError(
            f"{directory}: the shares of {len(files)} ranks do not make the config's model: a rank "
            f"is missing, or the config is of another model ({error})"
        ) from error


def _check_sizes(
    tensors: Mapping[str, LazyTensor], files: Mapping[str, bytes], directory: Location
) -> None:
    """Raise a `SchemaError` unless the model's tensors are as long as its config says.

    A model with a head passes through by name, and of an adapter's target the base is left behind:
    nothing else would see that the last ranks are missing.
    """
    known = shapes_of_config(files, directory)
    parsed = ((adapter_names.parse(name), tensor) for name, tensor in tensors.items())
    base = {name.path: tensor for name, tensor in parsed if not name.kind}
    base = dict(named_as_in_files(base, files, directory)[0])
    base, _ = task_heads.without_module(base, known)
    for name, shape in known.items():
        if name in base and base[name].shape != shape:
            raise SchemaError(
                f"{name!r} is {list(base[name].shape)}, the config says {list(shape)}"
            )
    if known and not known.keys() & base.keys():
        raise SchemaError(f"no tensor has a name of the config's model; found {listing(base, 2)}")


def _left(place: Location, source: Location) -> Iterator[Dropped]:
    """Yield the other forms of the same weights, and of a step what is not the model's."""
    own = place.parent if place.parent.name == _WHOLE else place
    folder = own if (own / TRACKER).is_file() else own.parent
    for name in (_WHOLE, _DCP, local_shards.FOLDER):
        if name != own.name and (folder / name).is_dir():
            yield Dropped(name, f"the weights of {own.name} are converted", size_of(folder / name))
    if folder.parent == source:
        yield from others_of_step(folder)
