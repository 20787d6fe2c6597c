"""Load what verl's FSDP workers save: one file per rank, with that rank's shares of all tensors.

    global_step_10/
        actor/
            model_world_size_4_rank_0.pt ...    name -> DTensor, ShardedTensor or plain tensor
            optim_world_size_4_rank_0.pt ...    extra_state_world_size_4_rank_0.pt ...
            fsdp_config.json                    {"FSDP_version": 2, "world_size": 4}, in later verl
            huggingface/                        config, tokenizer
        critic/  data.pt

Source: volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ckptx.adapters import adapter_options
from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import collector_paused
from ckptx.containers.sharded import Rank, Share, share, whole
from ckptx.errors import FormatError, listing
from ckptx.hookspecs import hookimpl
from ckptx.lazy import LazyTensor
from ckptx.model_directory import base_sidecars, hf_messages
from ckptx.plugin import Loader
from ckptx.plugins.trained import WEIGHTS_ONLY, beside, unwrapped
from ckptx.protocol import Begin, Dropped, Message, SourceTensor

ACTOR = "actor"
"""The model that is trained, of those that a step holds."""
_TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")
_MODEL_FILE = re.compile(r"model_world_size_([1-9]\d{0,5})_rank_(0|[1-9]\d{0,5})\.pt")
_STATE_FILE = re.compile(r"((?:optim|extra_state)_world_size_\d+_rank_)\d+\.pt")
_CONFIG = "fsdp_config.json"
_HUGGINGFACE = "huggingface"
_WEIGHTS = (".safetensors", ".bin", ".index.json")


class VerlLoader:
    """Reads the files of all ranks where they lie; no process group, no model."""

    name = "verl"
    capabilities: Mapping[str, Any] = {
        "formats": ["verl (FSDP)"],
        "layouts": ["hf"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for the model of a step and for adapters."""
        return [
            click.Option(
                ["--actor-dir"],
                default=ACTOR,
                show_default=True,
                help="Folder of a step whose model is converted: actor or critic.",
            ),
            *adapter_options(),
        ]

    def detect(self, source: Path) -> bool:
        """Return whether there are rank files: here, or in the actor of a step."""
        try:
            directory, _ = _find(source, ACTOR)
        except FormatError:
            # A run whose tracker points nowhere, which `load` will say.
            return (source / _TRACKER).is_file() and any(source.glob("global_step_*"))
        return _holds_model(directory)

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; names that no schema knows pass through."""
        directory, notes = _find(source, options.get("actor_dir") or ACTOR)
        files = _rank_files(directory)
        with collector_paused():
            found = _read(files, directory)
        small = {name: data for name, data in beside(directory).items() if name != _CONFIG}
        begin = Begin(
            format=self.name,
            layout="hf",
            parts={},
            files=tuple(str(file.absolute()) for file in files),
            sources=found.sources,
            root=str(directory),
            sidecars={**small, **base_sidecars(options)},
            training={"iteration": _iteration(directory)},
            parallel={"world_size": len(files)},
        )
        dropped = (*found.dropped, *_left(directory, source, begin.sidecars))
        yield from hf_messages(begin, found.tensors, notes, options.get("dtype"), dropped, options)


@dataclass(frozen=True, slots=True)
class _Found:
    """The tensors of all ranks together, each rank's own, and what is none."""

    tensors: Mapping[str, LazyTensor]
    sources: tuple[SourceTensor, ...]
    dropped: tuple[Dropped, ...]


def _find(source: Path, actor: str) -> tuple[Path, tuple[str, ...]]:
    """Return the directory of the rank files, and remarks on how it was chosen.

    Raises:
        FormatError: ``source`` is neither it, nor a step, nor a run with a tracker.
    """
    if _holds_model(source):
        return source, ()
    step = source
    notes: tuple[str, ...] = ()
    tracker = source / _TRACKER
    if tracker.is_file():
        number = tracker.read_text(errors="replace").strip()
        step = source / f"global_step_{number}"
        if not number.isdigit() or not step.is_dir():
            raise FormatError(
                f"{tracker}: points to global_step_{number:.20}, which is not there; give the "
                "directory of a step itself"
            )
        notes = (f"{step.name} was converted, the latest by {_TRACKER}",)
    directory = step / actor
    if any((place / "dist_ckpt").is_dir() for place in (source, directory)):
        raise FormatError(
            f"{source}: was saved by verl's Megatron workers (dist_ckpt), which is not loaded yet"
        )
    if not _holds_model(directory):
        raise FormatError(
            f"{source}: holds no model_world_size_W_rank_R.pt, and neither does {directory}; "
            "give a step of verl's FSDP workers, or say which model with --actor-dir"
        )
    return directory, notes


def _holds_model(directory: Path) -> bool:
    return directory.is_dir() and any(map(_MODEL_FILE.fullmatch, _names(directory)))


def _names(directory: Path) -> list[str]:
    return [path.name for path in sorted(directory.iterdir())]


def _rank_files(directory: Path) -> list[Path]:
    """Return the files of all ranks, by rank.

    Raises:
        FormatError: ranks are missing or too many, or the number of ranks is contradicted.
    """
    worlds: dict[int, dict[int, Path]] = {}
    for match in filter(None, map(_MODEL_FILE.fullmatch, _names(directory))):
        world, rank = map(int, match.groups())
        worlds.setdefault(world, {})[rank] = directory / match[0]
    if len(worlds) > 1:
        raise FormatError(
            f"{directory}: holds the files of {' and '.join(map(str, sorted(worlds)))} ranks; "
            "move away those that do not belong to this checkpoint"
        )
    ((world, ranks),) = worlds.items()
    said = _said_world(directory / _CONFIG)
    if said is not None and said != world:
        raise FormatError(
            f"{directory / _CONFIG}: says {said!r:.40} ranks, the names of the files {world}; they "
            "are of different runs"
        )
    beyond = sorted(rank for rank in ranks if rank >= world)
    if beyond:
        raise FormatError(
            f"{ranks[beyond[0]]}: expected ranks 0 to {world - 1}; move away the file, which is of "
            "another run"
        )
    if len(ranks) < world:
        names = (f"model_world_size_{world}_rank_{n}.pt" for n in range(world) if n not in ranks)
        missing = listing(itertools.islice(names, 3))
        raise FormatError(
            f"{directory}: {world - len(ranks)} of {world} rank files are missing: {missing}; copy "
            "them"
        )
    return [ranks[rank] for rank in range(world)]


def _said_world(config: Path) -> Any:
    """Return what ``fsdp_config.json`` says of the number of ranks, None without it."""
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_bytes())["world_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{config}: expected a JSON object with world_size") from error


def _read(files: list[Path], directory: Path) -> _Found:
    """Return the tensors of which the ranks hold shares.

    Raises:
        FormatError: a file is damaged, or the ranks do not hold shares of the same tensors.
    """
    shares: dict[str, list[Share]] = {}
    sources: list[SourceTensor] = []
    dropped: dict[str, int] = {}
    for number, file in enumerate(files):
        rank = Rank(str(file), number, len(files))
        value = torch_zip.read(file, number).value
        if not isinstance(value, Mapping):
            raise FormatError(f"{file}: expected a state dict, found {type(value).__name__}")
        for name, entry in value.items():
            if entry is None or str(name).endswith("_extra_state"):
                size = entry.nbytes if isinstance(entry, LazyTensor) else 0
                dropped[str(name)] = dropped.get(str(name), 0) + size
                continue
            found = share(entry, rank, str(name))
            shares.setdefault(str(name), []).append(found)
            sources += (
                SourceTensor(f"rank {number}: {name} at {list(offsets)}", local)
                for offsets, local in found.boxes
            )
        absent = [name for name, held in shares.items() if len(held) != number + 1]
        if absent:
            raise FormatError(
                f"{file}: expected the tensors of the other ranks, found others or fewer, as by "
                f"{listing(absent, 2)}; the files are of different runs"
            )
    tensors = {name: whole(held, f"{directory}: {name!r}") for name, held in shares.items()}
    tensors = unwrapped(tensors, directory)
    none = tuple(Dropped(name, WEIGHTS_ONLY, size) for name, size in dropped.items())
    return _Found(tensors, tuple(sources), none)


def _iteration(directory: Path) -> int | str:
    """Return the step that the name of a directory or of the one above says."""
    for place in (directory.absolute(), directory.absolute().parent):
        if match := _STEP.fullmatch(place.name):
            return int(match[1])
    return "release"


def _left(directory: Path, source: Path, carried: Mapping[str, bytes]) -> tuple[Dropped, ...]:
    """Return what stays behind of a model's directory, and of the step if that was the source."""
    taken = {_CONFIG, _HUGGINGFACE, *carried}
    sizes: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        if _MODEL_FILE.fullmatch(path.name) or path.name in taken:
            continue
        match = _STATE_FILE.fullmatch(path.name)
        name = f"{match[1]}*.pt" if match else path.name
        sizes[name] = sizes.get(name, 0) + _size(path)
    dropped = [Dropped(name, WEIGHTS_ONLY, size) for name, size in sizes.items()]
    if (directory / _HUGGINGFACE).is_dir():
        dropped += (
            Dropped(f"{_HUGGINGFACE}/{path.name}", "weights are read from the ranks", _size(path))
            for path in sorted((directory / _HUGGINGFACE).iterdir())
            if path.name.endswith(_WEIGHTS)
        )
    if source != directory:
        others = (path for path in sorted(directory.parent.iterdir()) if path != directory)
        dropped += (
            Dropped(p.name, f"only {directory.name} is converted", _size(p)) for p in others
        )
    return tuple(dropped)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    return sum(file.stat().st_size for file in files)


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(VerlLoader())
