"""Load a Hugging Face model: safetensors or ``pytorch_model*.bin``, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ckptx.containers import safetensors, torch_zip
from ckptx.errors import FormatError, listing
from ckptx.hookspecs import hookimpl
from ckptx.lazy import LazyTensor, Stored
from ckptx.loading import drop_ignored, inventory, main_dtype, messages_of, passthrough, resolve_tie
from ckptx.model_directory import base_sidecars, family_of, read_config, sidecars
from ckptx.plugin import Loader
from ckptx.protocol import Begin, Dropped, End, Message

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


class HfLoader:
    """Reads a model directory as transformers writes it, or one safetensors file."""

    name = "hf"
    capabilities: Mapping[str, Any] = {
        "formats": ["safetensors", "pytorch_model.bin"],
        "layouts": ["hf"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return no options: everything is read from the directory."""
        return []

    def detect(self, source: Path) -> bool:
        """Return whether there are weights under Hugging Face's file names."""
        if source.is_file():
            return source.suffix == ".safetensors"
        if any((source / name).exists() for name in (*_INDEXES, *_SINGLES)):
            return True
        return (source / "config.json").exists() and any(source.glob("*.safetensors"))

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; tensors of an unknown architecture pass through by name."""
        directory = source if source.is_dir() else source.parent
        paths, tensors = _read_weights(source)
        files = {**sidecars(directory), **base_sidecars(options)}
        config = read_config(files, directory)
        family = family_of(config) if config else None
        begin = Begin(
            format="hf",
            layout="hf",
            parts={},
            files=tuple(map(str, paths)),
            sources=inventory(tensors),
            root=str(directory),
            sidecars=files,
            training={"iteration": "release"},
        )
        if config is None or family is None:
            named = (config or {}).get("architectures") or ["no architecture"]
            yield begin
            yield passthrough(tensors)
            yield End(notes=(f"{', '.join(named)}: no schema, tensors pass through by name",))
            return
        spec = replace(family.from_config(config), dtype=main_dtype(tensors))
        layout = family.layout("hf")
        left: dict[str, LazyTensor] = dict(tensors)
        dropped: tuple[Dropped, ...] = drop_ignored(layout, left)
        notes: tuple[str, ...] = ()
        if spec.tied:
            tied, tie_dropped, notes = resolve_tie(
                left, "model.embed_tokens.weight", "lm_head.weight", begin.files
            )
            spec, dropped = replace(spec, tied=tied), (*dropped, *tie_dropped)
        yield replace(begin, layout=layout.name, parts={"language": spec})
        yield from messages_of(layout, left, spec)
        yield End(dropped, notes)


@dataclass(slots=True)
class _Weights:
    """The tensors of several files, each name once."""

    directory: Path
    paths: list[Path]
    tensors: dict[str, Stored]
    homes: dict[str, str]

    def add(self, path: Path) -> None:
        number = len(self.paths)
        self.paths.append(path)
        for name, tensor in _read_file(path, number).items():
            if name in self.tensors:
                raise FormatError(
                    f"{path}: {name!r} is also in {self.homes[name]}; remove the file that does not "
                    "belong to this model"
                )
            self.tensors[name] = tensor
            self.homes[name] = path.name


def _read_weights(source: Path) -> tuple[list[Path], dict[str, Stored]]:
    weights = _Weights(source if source.is_dir() else source.parent, [], {}, {})
    if source.is_file():
        weights.add(source)
        return weights.paths, weights.tensors
    index = next((source / name for name in _INDEXES if (source / name).exists()), None)
    if index is not None:
        _read_index(index, weights)
        return weights.paths, weights.tensors
    single = next((source / name for name in _SINGLES if (source / name).exists()), None)
    paths = [single] if single else sorted(source.glob("*.safetensors"))
    numbered = [path for path in paths if "-of-" in path.name]
    if numbered:
        raise FormatError(
            f"{source}: holds shards ({numbered[0].name}) but no index ({_INDEXES[0]}), so a missing "
            "shard could not be seen; copy the index"
        )
    if not paths:
        raise FormatError(f"{source}: holds no weights ({', '.join(_SINGLES)} or an index)")
    for path in paths:
        weights.add(path)
    return weights.paths, weights.tensors


def _read_index(index: Path, weights: _Weights) -> None:
    try:
        mapping = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(mapping.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: not a weight index: {error}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"{index}: {shard!r} is not the name of a file beside it")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise FormatError(
            f"{index.parent}: {len(absent)} of {len(shards)} shards are missing: {listing(absent)}; "
            "copy them"
        )
    for shard in shards:
        weights.add(index.parent / shard)
    wrong = [name for name, shard in mapping.items() if weights.homes.get(name) != shard]
    if wrong:
        first = wrong[0]
        raise FormatError(
            f"{index}: says {first!r} is in {mapping[first]}, found in "
            f"{weights.homes.get(first, 'no file')} ({len(wrong)} such tensors); the index and the "
            "shards are of different models"
        )
    unlisted = sorted(set(weights.tensors) - set(mapping))
    if unlisted:
        raise FormatError(
            f"{index}: does not list {listing(unlisted)}, which the shards hold; the index and the "
            "shards are of different models"
        )


def _read_file(path: Path, number: int) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return safetensors.tensors(path, number)
    value = torch_zip.read(path, number).value
    if not isinstance(value, dict) or not all(isinstance(v, Stored) for v in value.values()):
        raise FormatError(f"{path}: expected a plain state dict of tensors; use --loader pytorch")
    return value


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(HfLoader())
