"""What the plugins for checkpoints of training frameworks share: a model's names and small files.

Source of the folders: huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0,
volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptx.hf_models.directory import hf_messages, sidecars
from ckptx.model.canonical_names import dimensions, keys_of
from ckptx.model.sharding import shard_tensors
from ckptx.protocol.context import Context, Options
from ckptx.protocol.messages import Begin, Dropped, End, Messages
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import family_of, parts_from_config
from ckptx.schemas.conventions import transformers_memory
from ckptx.storage.location import Location
from ckptx.tensors.lazy import Filled, LazyTensor, Shape

_BESIDE = ("huggingface", "hf_config", "tokenizer")


def trained_messages(
    begin: Begin, tensors: Mapping[str, LazyTensor], end: End, options: Options, context: Context
) -> Messages:
    """Yield the messages of a model whose tensors have the names of memory, as `hf_messages`.

    ``end`` is what stays behind, and remarks.
    """
    tensors, remarks = named_as_in_files(tensors, begin.sidecars, begin.root)
    notes, renamer = (*end.notes, *remarks), transformers_memory.renamer
    yield from hf_messages(begin, tensors, notes, end.dropped, options, context, renamer)


def named_as_in_files(
    tensors: Mapping[str, LazyTensor], files: Mapping[str, bytes], place: object
) -> tuple[Mapping[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors under the names that model directories have, and remarks.

    The config among ``files`` says which model it is; without one names stay as they are.

    Raises:
        SchemaError: two tensors have one name then.
    """
    if (config := read_config(files, place)) is None:
        return tensors, ()
    found = transformers_memory.in_files(tensors, config)
    return found, transformers_memory.remarks(
        *(tensors, found, config),
        changed="they were given those of its files",
        kept="those of the source are kept",
    )


def nearest_config(source: Location) -> dict[str, bytes]:
    """Return the sidecars of the nearest directory that has a config: here, or above."""
    for directory in (source, *list(source.absolute().parents)[:2]):
        for place in (directory, *(directory / name for name in _BESIDE)):
            if (place / CONFIG).is_file():
                return sidecars(place)
    return {}


def shapes_of_config(files: Mapping[str, bytes], place: object) -> dict[str, Shape]:
    """Return the shapes of a model by Hugging Face's names, in its order, as its config says them.

    None where there is no config, or no schema knows its model.
    """
    config = read_config(files, place)
    family = family_of(config) if config else None
    if config is None or family is None:
        return {}
    shapes: dict[str, Shape] = {}
    for held in family.layout("hf").held(parts_from_config(family, config)):
        values = {**dimensions(held.spec), "vocab": held.spec.vocab_size or 0}
        known = keys_of(held.message, held.spec)
        named = [key for entry in held.rules for key in entry.keys]
        sizes = {key: [values.get(symbol) or 0 for symbol in known[key].shape] for key in named}
        if any(0 in shape for shape in sizes.values()):
            continue  # the config does not say them
        message = {key: Filled("float32", tuple(shape)) for key, shape in sizes.items()}
        given = shard_tensors(held.rules, message, held.spec, held.layer)
        shapes |= {name: tensor.shape for name, tensor in given.items()}
    return shapes


def others_of_step(folder: Location) -> tuple[Dropped, ...]:
    """Return what lies beside the folder of a step that is converted."""
    others = [path for path in sorted(folder.parent.iterdir()) if path != folder]
    return tuple(Dropped(p.name, f"only {folder.name} is converted", size_of(p)) for p in others)


def size_of(path: Location) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    return sum(file.stat().st_size for file in files)
