"""The weights of a Hugging Face model directory, and what a base model may fill in."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from ckptx.containers import safetensors, torch_zip
from ckptx.containers.safetensors import unique_keys
from ckptx.errors import FormatError, listing
from ckptx.protocol.context import Context
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_small
from ckptx.tensors.lazy import Stored

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.safetensors|\.bin)")
_MAX_INDEX = 256 << 20  # bytes; a million tensors have about 80 MB
_NAME_MAX = 255  # bytes; linux include/uapi/linux/limits.h


@dataclass(slots=True)
class Weights:
    """The tensors of several files, each name once.

    ``paths`` is the file table that the tensors refer to, ``homes`` says in which file each lies.
    """

    paths: list[Location]
    tensors: dict[str, Stored]
    homes: dict[str, str]

    def add(self, path: Location) -> None:
        """Add the tensors of a file.

        Raises:
            FormatError: the file is damaged, or holds a tensor that another has.
        """
        number = len(self.paths)
        self.paths.append(path)
        for name, tensor in _read_file(path, number).items():
            if name in self.tensors:
                raise FormatError(
                    f"{path}: {name!r} is also in {self.homes[name]}; remove the file that does "
                    "not belong to this model"
                )
            self.tensors[name] = tensor
            self.homes[name] = path.name


def read_weights(source: Location) -> Weights:
    """Return the tensors of a model directory, or of one file.

    Raises:
        FormatError: shards are missing, damaged, or do not belong together.
    """
    weights = Weights([], {}, {})
    if source.is_file():
        weights.add(source)
        return weights
    single, index = _chosen(source)
    if index is not None:
        _read_index(index, weights)
        return weights
    if single is not None and single.is_dir():  # DeepSpeed's zero_to_fp32 makes one so named
        return read_weights(single)
    paths = [single] if single else numbered_shards(source) or sorted(source.glob("*.safetensors"))
    if not paths:
        raise FormatError(f"{source}: holds no weights ({', '.join(SINGLES)} or an index)")
    for path in paths:
        weights.add(path)
    return weights


def numbered_shards(source: Location) -> list[Location]:
    """Return the shards of a directory without an index, whose numbers prove that all are there.

    Raises:
        FormatError: some are missing, or there are several sets.
    """
    sets: dict[tuple[str, int, str], dict[int, Location]] = {}
    for path in source.iterdir():
        if match := _SHARD.fullmatch(path.name):
            stem, number, count, suffix = match.groups()
            sets.setdefault((stem, int(count), suffix), {})[int(number)] = path
    kinds = {suffix for _, _, suffix in sets}
    found = {key: shards for key, shards in sets.items() if key[2] == max(kinds)}
    if not found:
        return []
    if len(found) > 1:
        names = sorted(shards[min(shards)].name for shards in found.values())
        raise FormatError(
            f"{source}: holds shards of several sets ({listing(names)}) and no index; move away "
            "those that are not the model's"
        )
    (((_, count, _), shards),) = found.items()
    first = 0 if 0 in shards else 1
    wanted = range(first, count + first)
    if absent := [number for number in wanted if number not in shards]:
        raise FormatError(
            f"{source}: holds {len(shards)} shards without an index "
            f"({shards[min(shards)].name}), and of {count} number {absent[0]} is missing; copy it"
        )
    if extra := sorted(shards.keys() - set(wanted)):
        raise FormatError(f"{shards[extra[0]]}: its number is none of {count}; move it away")
    return [shards[number] for number in wanted]


def _chosen(source: Location) -> tuple[Location | None, Location | None]:
    """Return the one file of weights of a directory, or the index of several, if it has either.

    Safetensors go before ``.bin`` files, as transformers and vLLM have it. Of one file and shards
    of the same kind transformers takes the file and vLLM the shards: nobody can say which are the
    model's. A file beside an index whose shards are all gone was saved after them.

    Source: huggingface/transformers src/transformers/modeling_utils.py,
    _get_resolved_checkpoint_files @ v5.23.0; vllm-project/vllm
    vllm/model_executor/model_loader/weight_utils.py, filter_duplicate_safetensors_files @ v0.11.0.

    Raises:
        FormatError: there are both, or the index is none.
    """
    for single_name, index_name in zip(SINGLES, INDEXES, strict=True):
        single, index = source / single_name, source / index_name
        if not index.exists():
            if single.exists():
                return single, None
            continue
        if not single.exists():
            return None, index
        shards = set(_mapping(index).values())
        if single_name in shards:
            return None, index
        if not any((source / shard).exists() for shard in shards):
            return single, None
        raise FormatError(
            f"{source}: holds {single_name} and the shards of {index_name}; transformers takes the "
            "one file, others take the shards. Remove those that are not the model's, or name the "
            "file itself"
        )
    return None, None


def _is_name(text: str) -> bool:
    """Return whether a text can be the name of a file, and leads to no other directory."""
    size = len(text.encode(errors="replace"))
    return Path(text).name == text and "\0" not in text and size <= _NAME_MAX


def _mapping(index: Location) -> dict[str, str]:
    """Return the file that an index says every tensor is in.

    Raises:
        FormatError: it is no index, or names files elsewhere.
    """
    try:
        mapping: dict[str, str] = json.loads(
            read_small(index, _MAX_INDEX), object_pairs_hook=unique_keys
        )["weight_map"]
        shards = dict.fromkeys(mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: not a weight index: {error}") from error
    for shard in shards:
        if not isinstance(shard, str) or not _is_name(shard):
            raise FormatError(f"{index}: {shard!r} is not the name of a file beside it")
    return mapping


def _read_index(index: Location, weights: Weights) -> None:
    mapping = _mapping(index)
    shards = sorted(set(mapping.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise FormatError(
            f"{index.parent}: {len(absent)} of {len(shards)} shards are missing: "
            f"{listing(absent)}; copy them"
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


def _read_file(path: Location, number: int) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return safetensors.tensors(path, number)
    value = torch_zip.read(path, number)
    if not isinstance(value, dict) or not all(isinstance(v, Stored) for v in value.values()):
        raise FormatError(f"{path}: expected a plain state dict of tensors; use --loader pytorch")
    return value


def fill_from_base(weights: Weights, context: Context) -> tuple[str, ...]:
    """Add tensors of ``--hf-base`` that the source lacks and ``--fill-from-base`` names.

    Returns:
        One remark for each tensor that was added.

    Raises:
        FormatError: patterns without a base, or a pattern that adds nothing.
    """
    filled, notes = base_tensors(weights.paths, weights.tensors, context)
    weights.tensors |= filled
    weights.homes |= {name: weights.paths[tensor.file].name for name, tensor in filled.items()}
    return notes


def base_tensors(
    paths: list[Location], present: Container[str], context: Context
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Return tensors of ``--hf-base`` that are not present and ``--fill-from-base`` names.

    Their files are added to ``paths``, the file table. With them come the remarks and the errors of
    `fill_from_base`.
    """
    if not context.fill_from_base:
        return {}, ()
    if context.hf_base is None:
        raise FormatError("--fill-from-base needs --hf-base, the model to fill from")
    base = read_weights(context.hf_base)
    filled: dict[str, Stored] = {}
    notes = []
    for pattern in context.fill_from_base:
        names = [
            name
            for name in fnmatch.filter(base.tensors, pattern)
            if name not in present and name not in filled
        ]
        if not names:
            raise FormatError(
                f"--fill-from-base {pattern!r}: matches no tensor of the base that the source lacks"
            )
        for name in names:
            tensor = base.tensors[name]
            filled[name] = replace(tensor, file=tensor.file + len(paths))
            notes.append(f"{name!r} was filled from the base model, {base.homes[name]}")
    paths += base.paths
    return filled, tuple(notes)
