"""What the plugins for checkpoints of training frameworks share: a model's names and small files.

Source of the prefixes: torch:torch/distributed/{fsdp,algorithms/_checkpoint}, torch/_dynamo @
v2.13.0; of the folders: huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0,
volcengine/verl verl/utils/checkpoint/fsdp_checkpoint_manager.py @ 01ee5e0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptx.errors import FormatError
from ckptx.lazy import LazyTensor
from ckptx.model_directory import CONFIG, sidecars

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


def beside(source: Path) -> dict[str, bytes]:
    """Return the sidecars of the nearest directory that has a config: here, or above."""
    for directory in (source, *list(source.absolute().parents)[:2]):
        for place in (directory, *(directory / name for name in _BESIDE)):
            if (place / CONFIG).is_file():
                return sidecars(place)
    return {}
