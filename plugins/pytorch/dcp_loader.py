"""Load a directory of `torch.distributed.checkpoint`, as FSDP, RLinf, accelerate and others write.

A checkpoint holds a nested dictionary, flattened. The path of every entry in it is in the metadata,
so a container (``app``, ``model``) is told from the first module of a name without guessing. Names
are those of Hugging Face, with what wrappers of the model have put into them.

Source: torch:torch/distributed/checkpoint/{metadata,default_planner}.py @ v2.13.0; prefixes as
huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0 and RLinf/RLinf
rlinf/hybrid_engines/fsdp/ @ main write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.containers import dcp, dcp_safetensors
from ckptx.containers.dcp_metadata import METADATA_NAME
from ckptx.errors import FormatError, listing
from ckptx.hf_models.directory import base_sidecars
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.plugins.pytorch.module_names import (
    file_names,
    nearest_config,
    size_of,
    strip_option,
    trained_messages,
)
from ckptx.protocol.contracts import Loader
from ckptx.protocol.from_names import inventory, named_messages
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, Message
from ckptx.protocol.sidecars import read_config
from ckptx.registry.families import family_of, parts_from_config
from ckptx.schemas.conventions import torchtitan
from ckptx.tensors.lazy import LazyTensor

TRAINING = (
    *("optim", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "rng", "scheduler"),
    *("train_state", "dataloader"),
)
"""Words of a path that say: state of the training, not weights."""
_BELOW = "pytorch_model_fsdp_0"
"""Where below a checkpoint accelerate and the Hugging Face Trainer put the model."""
_STEP = re.compile(r"step-(\d+)")
"""The directory of a step of torchtitan."""
_MEGATRON = ("decoder.layers.", "embedding.word_embeddings.")
_MEGATRON_FSDP = ("model.module.decoder.", "model.module.embedding.")


class DcpLoader:
    """Reads the chunks where they lie; no process group, no model."""

    name = "dcp"
    capabilities: Mapping[str, Any] = {
        "formats": ["torch.distributed.checkpoint", "its safetensors shards"],
        "layouts": ["hf", "torchtitan"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for the container, for names and for adapters."""
        return [
            click.Option(
                ["--container"],
                help="Path of the model in the saved dictionary, as 'app.model'.  "
                "[default: the one that holds weights]",
            ),
            strip_option(),
            *adapter_options(),
        ]

    def detect(self, source: Path) -> bool:
        """Return whether there is metadata, not Megatron's, or was about to be, or shards."""
        if dcp_safetensors.shards(source):
            return True
        directory = _find(source)
        known = (directory / METADATA_NAME).is_file() or _is_unfinished(directory)
        return known and not (directory / "metadata.json").exists()

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; names that no schema knows pass through."""
        if paths := dcp_safetensors.shards(source):
            yield from _of_safetensors(paths, source, options)
            return
        given, source = source, _find(source)
        if _is_unfinished(source):
            raise FormatError(
                f"{source}: holds .distcp files and no {METADATA_NAME}, which is written last: the "
                "save was not finished; use an earlier one"
            )
        metadata = dcp.read_metadata(source)
        _refuse_megatron(metadata, source)
        container, names = _model(metadata, options.get("container"), source)
        files: list[str] = []
        stored = dcp.tensors(metadata, files, names, options.get("spool"))
        named = {names[key]: tensor for key, tensor in stored.items()}
        weights, remarks = file_names(named, options, source)
        begin = Begin(
            format=self.name,
            layout="hf",
            parts={},
            files=tuple(files),
            sources=inventory(stored),
            root=str(source),
            sidecars={**nearest_config(source), **base_sidecars(options)},
            training={"iteration": "release", "container": container},
        )
        dropped = (*_left(metadata, names), *_around(source, given))
        notes = (f"the weights are those of {container!r}",) if container else ()
        yield from _messages(begin, weights, (*notes, *remarks), options, dropped)


def _of_safetensors(
    paths: list[Path], source: Path, options: Mapping[str, Any]
) -> Iterator[Message]:
    """Yield the model that lies in shards of safetensors."""
    tensors, stored = dcp_safetensors.tensors(paths)
    begin = Begin(
        format="dcp",
        layout="hf",
        parts={},
        files=tuple(str(path.absolute()) for path in paths),
        sources=inventory(stored),
        root=str(source),
        sidecars={**nearest_config(source), **base_sidecars(options)},
        training={"iteration": "release"},
    )
    weights, remarks = file_names(tensors, options, source)
    found = f"{len(paths)} shards were found; nothing in them says how many there are"
    yield from _messages(begin, weights, (found, *remarks), options)


def _messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...],
    options: Mapping[str, Any],
    dropped: tuple[Dropped, ...] = (),
) -> Iterator[Message]:
    if torchtitan.EMBEDDING in tensors:
        return _torchtitan(begin, tensors, notes, dropped)
    return trained_messages(begin, tensors, notes, dropped, options)


def _torchtitan(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...],
    dropped: tuple[Dropped, ...],
) -> Iterator[Message]:
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
    match = _STEP.fullmatch(Path(begin.root).absolute().name)
    training = {**begin.training, "iteration": int(match[1]) if match else "release"}
    begin = replace(begin, training=training)
    yield from named_messages(begin, tensors, parts, layout, notes, dropped)


def _find(source: Path) -> Path:
    """Return the directory itself, or the one of a model below it, as frameworks name it."""
    below = source / _BELOW
    found = not (source / METADATA_NAME).is_file() and (below / METADATA_NAME).is_file()
    return below if found else source


def _around(directory: Path, given: Path) -> tuple[Dropped, ...]:
    """Return what lies beside the model's directory where one above was given."""
    if directory == given:
        return ()
    return tuple(
        Dropped(path.name, TRAINING_STATE, size_of(path))
        for path in sorted(directory.parent.iterdir())
        if path != directory and path.suffix not in (".json", ".txt", ".model", ".jinja")
    )


def _is_unfinished(source: Path) -> bool:
    """Return whether ranks have written their files, and nobody the metadata, which comes last."""
    return not (source / METADATA_NAME).exists() and any(source.glob("*.distcp"))


def _refuse_megatron(metadata: dcp.DcpMetadata, source: Path) -> None:
    """Raise where the tensors are Megatron's, which have other names and ways to lie."""
    if any(key.startswith(_MEGATRON_FSDP) for key in metadata.tensors):
        raise FormatError(f"{source}: a Megatron-FSDP checkpoint, which is not loaded yet")
    if any(key.startswith(_MEGATRON) for key in metadata.tensors):
        raise FormatError(
            f"{source}: holds Megatron's tensors and no metadata.json, which is written last: the "
            "save was not finished; use an earlier iteration"
        )


def _model(
    metadata: dcp.DcpMetadata, chosen: str | None, source: Path
) -> tuple[str, dict[str, str]]:
    """Return the container of the weights, and its keys with the names that they have in it.

    Raises:
        FormatError: several containers hold weights, or none does.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for key in metadata.tensors:
        *container, name = metadata.planner_data.get(key) or _guessed(key)
        groups.setdefault(tuple(map(str, container)), {})[key] = str(name)
    known = {".".join(path): keys for path, keys in groups.items()}
    if chosen is not None:
        if chosen not in known:
            raise FormatError(
                f"{source}: holds no container {chosen!r}; found {listing(sorted(known))}"
            )
        return chosen, known[chosen]
    models = {
        path: keys
        for path, keys in known.items()
        if not any(word in TRAINING or word == "state" for word in path.split("."))
    }
    if len(models) != 1:
        found = listing(sorted(models)) if models else "none"
        raise FormatError(
            f"{source}: expected one container of weights, found {found}; say which with "
            "--container"
        )
    return next(iter(models.items()))


_CONTAINERS = ("fsdp_checkpoint.model.", "app.model.")


def _guessed(key: str) -> tuple[str, ...]:
    """Return the path of a key whose metadata has none: it was saved flat."""
    for prefix in _CONTAINERS:
        if key.startswith(prefix):
            return (prefix.rstrip("."), key.removeprefix(prefix))
    first, _, rest = key.partition(".")
    return (first, rest) if first in TRAINING else (key,)


def _left(metadata: dcp.DcpMetadata, taken: Mapping[str, str]) -> tuple[Dropped, ...]:
    """Return what stays behind, by the first word of its key, with its bytes."""
    sizes: dict[str, int] = {}
    for (key, _), location in metadata.items.items():
        if key not in taken:
            group = key.partition(".")[0]
            sizes[group] = sizes.get(group, 0) + location.length
    return tuple(Dropped(group, TRAINING_STATE, size) for group, size in sizes.items())


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(DcpLoader())
