"""Load one ``.pt`` file that holds the state dict of a whole model.

RLinf's containers: RLinf/RLinf rlinf/hybrid_engines/fsdp/strategy/checkpoint.py @ 85104b9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.adapters import adapter_options, holds_adapters
from ckptx.containers import torch_zip
from ckptx.containers.sharded import is_sharded
from ckptx.errors import FormatError, listing
from ckptx.hookspecs import hookimpl
from ckptx.lazy import LazyTensor, Stored
from ckptx.loading import inventory, passthrough
from ckptx.model_directory import (
    base_sidecars,
    family_named,
    family_of,
    hf_messages,
    named_messages,
    parts_from_config,
    read_config,
    sidecars,
)
from ckptx.model_weights import Weights, fill_from_base
from ckptx.plugin import Loader
from ckptx.plugins.megatron.source import args_of
from ckptx.plugins.state_dict import (
    DIRECTORY_FILE,
    layout_of,
    layout_option,
    layout_option_value,
)
from ckptx.protocol import Begin, Dropped, End, Message
from ckptx.schema import Parts
from ckptx.schemas import legacy
from ckptx.schemas.args import spec_from_args

_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
_CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
_AROUND = "fsdp_checkpoint"
"""A container of containers, where RLinf's whole checkpoint was put in one file."""
_LOCAL_SHARDS = "local_shard_checkpoint"
_CONVENTIONS = {"hf": "hf", "core": "mcore", "legacy": "legacy"}
WEIGHTS_ONLY = "only weights are converted"


class PytorchLoader:
    """Reads the extents of the tensors from the file's own pickle; nothing of it is executed."""

    name = "pytorch"
    capabilities: Mapping[str, Any] = {
        "formats": ["torch.save"],
        "layouts": ["hf", "mcore", "legacy"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return ``--layout`` and the options for adapters."""
        return [layout_option(), *adapter_options()]

    def detect(self, source: Path) -> bool:
        """Return whether the source is a zip archive with a name that torch files have."""
        file = _file_of(source)
        if not file.is_file() or file.suffix not in _SUFFIXES:
            return False
        with file.open("rb") as stream:
            return stream.read(4) == b"PK\3\4"

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; names that no schema knows pass through."""
        source = _file_of(source)
        if not source.is_file():
            raise FormatError(f"{source}: expected one file of torch.save")
        if source.parent.name == _LOCAL_SHARDS:
            raise FormatError(
                f"{source}: RLinf's local shards do not say where in the model they lie; give "
                "dcp_checkpoint, or model_state_dict/full_weights.pt"
            )
        value = torch_zip.read(source, 0).value
        tensors, others = state_dict(value, source)
        weights = Weights([source], tensors, dict.fromkeys(tensors, source.name))
        filled = fill_from_base(weights, options)
        files = {**_beside(source), **base_sidecars(options)}
        begin = Begin(
            format="pytorch",
            layout=layout_option_value(options) or layout_of(tensors),
            parts={},
            files=tuple(map(str, weights.paths)),
            sources=inventory(tensors),
            root=str(source.parent),
            sidecars=files,
            training={"iteration": value.get("iteration", "release")},
        )
        version = value.get("checkpoint_version", 0)
        args = args_of(value, source)
        for message in _messages(begin, dict(tensors), args, version, others, options):
            if isinstance(message, End):
                message = replace(message, notes=(*filled, *message.notes))
            yield message


def state_dict(value: Any, source: Path) -> tuple[dict[str, Stored], tuple[Dropped, ...]]:
    """Return the tensors of a state dict, wherever it lies in a file, and what else is in it.

    Raises:
        FormatError: there is no state dict, or only one rank's part of it.
    """
    if not isinstance(value, Mapping):
        raise FormatError(f"{source}: expected a dictionary, found {type(value).__name__}")
    if isinstance(value.get(_AROUND), Mapping):
        value = {**{key: value[key] for key in value if key != _AROUND}, **value[_AROUND]}
    inner = next((value[key] for key in _CONTAINERS if isinstance(value.get(key), Mapping)), value)
    content = inner
    if "language_model" in inner:
        inner = legacy.flattened(inner)
    tensors = {str(name): entry for name, entry in inner.items() if isinstance(entry, Stored)}
    shares = [name for name, entry in inner.items() if is_sharded(entry)]
    if shares:
        raise FormatError(
            f"{source}: {shares[0]!r} is what one rank holds of a tensor; give the directory with "
            "the files of all ranks to --loader verl"
        )
    if not tensors:
        raise FormatError(
            f"{source}: holds no state dict of tensors ({listing(map(str, value))} found); known "
            f"containers: {', '.join(_CONTAINERS)}"
        )
    others = [str(name) for name in inner if name not in tensors]
    if content is not value:
        others += [str(key) for key in value if value[key] is not content]
    dropped = tuple(
        Dropped(name, WEIGHTS_ONLY) for name in others if not name.endswith("_extra_state")
    )
    return tensors, dropped


def _messages(
    begin: Begin,
    tensors: dict[str, LazyTensor],
    args: Mapping[str, Any],
    version: Any,
    others: tuple[Dropped, ...],
    options: Mapping[str, Any],
) -> Iterator[Message]:
    convention = _CONVENTIONS[begin.layout]
    if convention == "hf" and holds_adapters(tensors, options):
        yield from hf_messages(begin, tensors, (), options.get("dtype"), others, options)
        return
    config = read_config(begin.sidecars, begin.root)
    family = family_of(config) if config else None
    megatron = convention != "hf"
    if begin.layout == "legacy":
        args = legacy.completed(args)
    parts: Parts
    if megatron and args:
        parts = {"language": spec_from_args(args)}
    elif family is not None and config is not None:
        parts = parts_from_config(family, config)
    else:
        yield begin
        yield passthrough(tensors)
        yield End(others, ("no config or args name the model: tensors pass through by name",))
        return
    composed = family.name if family is not None and "vision" in parts else ""
    layout = family_named(composed or parts["language"].family).layout(convention)
    if begin.layout == "legacy":
        layout = legacy.ordered(layout, version, parts["language"])
    training = {**begin.training, "args": args if megatron and args else None}
    begin = replace(begin, training=training, family=composed)
    yield from named_messages(begin, tensors, parts, layout, dropped=others)


def _file_of(source: Path) -> Path:
    """Return the file that is meant: a directory is one that the saver has written."""
    return source / DIRECTORY_FILE if source.is_dir() else source


def _beside(source: Path) -> dict[str, bytes]:
    """Return the sidecars of the directory, if it is a model's and not just any."""
    return sidecars(source.parent) if (source.parent / "config.json").is_file() else {}


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(PytorchLoader())
