"""Load what verl's workers save.

Those of FSDP write one file per rank, with that rank's shares of all tensors; those of Megatron are
read by `ckptx.plugins.verl.megatron`.

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

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import collector_paused
from ckptx.containers.sharded import Rank, Share, share, whole
from ckptx.conversion.options import switch
from ckptx.errors import FormatError, listing
from ckptx.hf_models.directory import base_sidecars
from ckptx.hf_models.lora.config import TRAINED_LORA
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.wrappers import file_names, name_options
from ckptx.plugins import run_directory
from ckptx.plugins.pytorch import module_names
from ckptx.plugins.verl import extra_state, megatron
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Messages, SourceTensor
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_json
from ckptx.tensors.lazy import LazyTensor

_MODEL_FILE = re.compile(r"model_world_size_([1-9]\d{0,5})_rank_(0|[1-9]\d{0,5})\.pt")
_STATE_FILE = re.compile(r"((?:optim|extra_state)_world_size_\d+_rank_)\d+\.pt")
_CONFIG = "fsdp_config.json"
_HUGGINGFACE = "huggingface"
_OWN = (_CONFIG, megatron.TRANSFORMER_CONFIG, TRAINED_LORA)
"""Files that look like a model's, and describe the training."""
_MODELS = (megatron.DISTRIBUTED, megatron.PER_RANK)
_WEIGHTS = (".safetensors", ".bin", ".index.json")


class VerlLoader:
    """Reads the files of all ranks where they lie; no process group, no model."""

    name = "verl"

    def options(self) -> list[click.Option]:
        """Return the options for the model of a step, in the spelling of verl's merger."""
        states = "Of FSDP workers: keep schedulers and random states, in files beside the model."
        value = "Of Megatron workers: insist on a head with one output, which is seen anyway."
        tied = "Of Megatron workers: leave the output layer out; the model is tied."
        return [
            run_directory.actor_option(),
            *adapter_options(),
            *name_options(),
            switch("--extra-state", states),
            switch("--is-value-model", value),
            switch("--tie-word-embedding", tied),
        ]

    def detect(self, source: Location) -> bool:
        """Return whether there are rank files: here, or in the actor of a step."""
        try:
            directory, _ = _find(source, run_directory.ACTOR)
        except FormatError:
            # A run whose tracker points nowhere, which `load` will say.
            return (source / run_directory.TRACKER).is_file() and any(source.glob("global_step_*"))
        return _holds_model(directory)

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; names that no schema knows pass through."""
        directory, notes = _find(source, options.get("actor_dir") or run_directory.ACTOR)
        beside = module_names.nearest_config(directory)
        small = {name: data for name, data in beside.items() if name not in _OWN}
        begin = Begin(
            format=self.name,
            root=str(directory),
            sidecars={**small, **base_sidecars(context)},
            training={"iteration": run_directory.step_of(directory, run_directory.GLOBAL_STEP, 1)},
        )
        left = _left(directory, source, begin.sidecars, bool(options.get("extra_state")))
        if not _holds_ranks(directory):
            if options.get("extra_state"):
                raise FormatError(
                    f"{directory}: was saved by Megatron workers; --extra-state is for those of "
                    "FSDP"
                )
            yield from megatron.messages(directory, begin, End(left, notes), options, context)
            return
        if options.get("is_value_model") or options.get("tie_word_embedding"):
            raise FormatError(
                f"{directory}: was saved by FSDP workers; --is-value-model and "
                "--tie-word-embedding are for those of Megatron"
            )
        files = _rank_files(directory)
        with collector_paused():
            tensors, sources, dropped = _read(files, directory)
        states: dict[str, bytes] = {}
        if options.get("extra_state"):
            states, remarks = extra_state.merged(directory, len(files))
            notes = (*notes, *remarks)
        begin = replace(
            begin,
            files=tuple(str(file.absolute()) for file in files),
            sources=sources,
            sidecars={**begin.sidecars, **states},
            parallel={"world_size": len(files)},
        )
        tensors, remarks = file_names(tensors, options, directory)
        end = End((*dropped, *left), (*notes, *remarks))
        yield from module_names.trained_messages(begin, tensors, end, options, context)


def _find(source: Location, actor: str) -> tuple[Location, tuple[str, ...]]:
    """Return the directory of the rank files, and remarks on how it was chosen.

    Raises:
        FormatError: ``source`` is neither it, nor a step, nor a run with a tracker.
    """
    if _holds_model(source):
        return source, ()
    step = source
    notes: tuple[str, ...] = ()
    tracker = source / run_directory.TRACKER
    if tracker.is_file():
        number = run_directory.tracked(tracker)
        step = source / f"global_step_{number}"
        if not number.isdigit() or not step.is_dir():
            raise FormatError(
                f"{tracker}: points to global_step_{number:.20}, which is not there; give the "
                "directory of a step itself"
            )
        notes = (f"{step.name} was converted, the latest by {run_directory.TRACKER}",)
    directory = step / actor
    if not _holds_model(directory):
        if others := sorted(path.name for path in step.iterdir() if _holds_model(path)):
            raise FormatError(
                f"{source}: {step.name} holds {listing(others)} and no {actor}; convert it with "
                f"--actor-dir {others[0]}"
            )
        raise FormatError(
            f"{source}: holds neither model_world_size_W_rank_R.pt (FSDP) nor dist_ckpt or "
            f"model/mp_rank_TT/model.pt (Megatron), and neither does {directory}; give a step that "
            "verl has saved, or say which model with --actor-dir"
        )
    return directory, notes


def _holds_model(directory: Location) -> bool:
    return directory.is_dir() and (_holds_ranks(directory) or megatron.holds_model(directory))


def _holds_ranks(directory: Location) -> bool:
    return any(map(_MODEL_FILE.fullmatch, run_directory.names_in(directory)))


def _rank_files(directory: Location) -> list[Location]:
    """Return the files of all ranks, by rank.

    Raises:
        FormatError: ranks are missing or too many, or the number of ranks is contradicted.
    """
    worlds: dict[int, dict[int, Location]] = {}
    for match in filter(None, map(_MODEL_FILE.fullmatch, run_directory.names_in(directory))):
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
    if beyond := sorted(rank for rank in ranks if rank >= world):
        raise FormatError(
            f"{ranks[beyond[0]]}: expected ranks 0 to {world - 1}; move away the file, which is of "
            "another run"
        )
    return run_directory.all_ranks(
        directory, ranks, world, f"model_world_size_{world}_rank_{{}}.pt"
    )


def _said_world(config: Location) -> Any:
    """Return what ``fsdp_config.json`` says of the number of ranks, None without it."""
    if not config.is_file():
        return None
    said = read_json(config)
    if "world_size" not in said:
        raise FormatError(f"{config}: expected a JSON object with world_size")
    return said["world_size"]


def _read(
    files: list[Location], directory: Location
) -> tuple[dict[str, LazyTensor], tuple[SourceTensor, ...], tuple[Dropped, ...]]:
    """Return the tensors of which the ranks hold shares, those of all ranks, and what is none.

    Raises:
        FormatError: a file is damaged, or the ranks do not hold shares of the same tensors.
    """
    shares: dict[str, list[Share]] = {}
    sources: list[SourceTensor] = []
    dropped: Counter[str] = Counter()
    for number, file in enumerate(files):
        rank = Rank(str(file), number, len(files))
        value = torch_zip.read(file, number)
        if not isinstance(value, Mapping):
            raise FormatError(f"{file}: expected a state dict, found {type(value).__name__}")
        for name, entry in value.items():
            if entry is None or str(name).endswith("_extra_state"):
                dropped[str(name)] += entry.nbytes if isinstance(entry, LazyTensor) else 0
                continue
            found = share(entry, rank, str(name))
            shares.setdefault(str(name), []).append(found)
            sources += (
                SourceTensor(f"rank {number}: {name} at {list(offsets)}", local)
                for offsets, local in found.boxes
            )
        run_directory.check_same_tensors(shares, number + 1, file)
    if not shares:
        raise FormatError(f"{directory}: the files of the {len(files)} ranks hold no weights")
    tensors = {name: whole(held, f"{directory}: {name!r}") for name, held in shares.items()}
    none = tuple(Dropped(name, TRAINING_STATE, size) for name, size in dropped.items())
    return tensors, tuple(sources), none


def _left(
    directory: Location, source: Location, carried: Mapping[str, bytes], states: bool
) -> tuple[Dropped, ...]:
    """Return what stays behind of a model's directory, and of the step if that was the source.

    ``states`` says that the extra states do not.
    """
    taken = {*_OWN, _HUGGINGFACE, *carried}
    if not _holds_ranks(directory):
        taken |= {next(name for name in _MODELS if (directory / name).is_dir())}
    sizes: Counter[str] = Counter()
    for path in sorted(directory.iterdir()):
        if _MODEL_FILE.fullmatch(path.name) or path.name in taken:
            continue
        match = _STATE_FILE.fullmatch(path.name)
        if states and match and match[1].startswith("extra_state"):
            continue
        sizes[f"{match[1]}*.pt" if match else path.name] += module_names.size_of(path)
    dropped = [Dropped(name, TRAINING_STATE, size) for name, size in sizes.items()]
    beside, why = directory / _HUGGINGFACE, "the weights of the ranks are converted"
    for path in sorted(beside.iterdir()) if beside.is_dir() else ():
        if path.name.endswith(_WEIGHTS):
            dropped.append(Dropped(f"{_HUGGINGFACE}/{path.name}", why, module_names.size_of(path)))
    return (*dropped, *(module_names.others_of_step(directory) if source != directory else ()))
