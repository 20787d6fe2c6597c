"""What the plugins for checkpoints of training frameworks share: a model's names and small files.

Source of the prefixes: torch:torch/distributed/{fsdp,algorithms/_checkpoint}, torch/_dynamo @
v2.13.0; of the folders: huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0,
volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptx.errors import FormatError
from ckptx.lazy import LazyTensor
from ckptx.model_directory import CONFIG, hf_messages, read_config, sidecars
from ckptx.protocol import Begin, Dropped, Message
from ckptx.schemas import in_memory

WEIGHTS_ONLY = "only weights are converted"
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
"""What FSDP 1, activation checkpointing, torch.compile and DDP put into names."""
_BESIDE = ("huggingface", "hf_config", "tokenizer")


def unwrapped(tensors: Mapping[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """Return the tensors under the names that they have without wrappers.

    Raises:
        FormatError: two tensors have one name then.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = name
        for word in WRAPPERS:
            plain = plain.replace(f".{word}", ".").removeprefix(word)
        if plain in found:
            raise FormatError(f"{source}: {name!r} and another tensor are both {plain!r}")
        found[plain] = tensor
    return found


def trained_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...],
    dropped: tuple[Dropped, ...],
    options: Mapping[str, Any],
) -> Iterator[Message]:
    """Yield the messages of a model whose tensors have the names of memory, as `hf_messages`."""
    tensors, remarks = named_as_in_files(tensors, begin.sidecars, begin.root)
    notes = (*notes, *remarks)
    yield from hf_messages(begin, tensors, notes, options.get("dtype"), dropped, options)


def named_as_in_files(
    tensors: Mapping[str, LazyTensor], files: Mapping[str, bytes], place: object
) -> tuple[Mapping[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors under the names that model directories have, and remarks.

    The config among ``files`` says which model it is; without one names stay as they are.

    Raises:
        SchemaError: two tensors have one name then.
    """
    config = read_config(files, place)
    if config is None:
        return tensors, ()
    found = in_memory.in_files(tensors, config)
    changed = [name for name in tensors if name not in found]
    if changed:
        return found, (
            f"{len(changed)} tensors have the names of transformers 5 in memory, as "
            f"{changed[0]!r}; they were given those of its files",
        )
    if in_memory.differs(config):
        return tensors, (
            f"{config.get('model_type')}: transformers may have other names in memory than in "
            "files; those of the source are kept",
        )
    return tensors, ()


def beside(source: Path) -> dict[str, bytes]:
    """Return the sidecars of the nearest directory that has a config: here, or above."""
    for directory in (source, *list(source.absolute().parents)[:2]):
        for place in (directory, *(directory / name for name in _BESIDE)):
            if (place / CONFIG).is_file():
                return sidecars(place)
    return {}
