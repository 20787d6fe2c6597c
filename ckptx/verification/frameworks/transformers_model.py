"""A model loaded by transformers, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from ckptx.errors import listing
from ckptx.verification.frameworks.tokenizer_files import holds_tokenizer
from ckptx.verification.frameworks.worker import SideError, first_sentence

_FAULTS = {
    "missing_keys": "are missing, so their weights would be random",
    "unexpected_keys": "are in the files and not in the model",
    "mismatched_keys": "have other shapes than the model, so their weights would be random",
    "error_msgs": "could not be loaded",
    "conversion_errors": "could not be converted",
}
"""What transformers reports of a load, by its own names of the lists."""


def load(directory: Path, dtype: str | None, device: str, remote: bool = False) -> Any:
    """Return a model, ready to run.

    ``dtype`` is torch's name, None for the one of the files; ``remote`` code may be trusted.

    Raises:
        SideError: there is no such class, or not every weight has been found in the files, or the
            files hold more.
    """
    config = config_of(directory, remote)
    loader, _ = auto_class(config, directory)
    wanted = "auto" if dtype is None else getattr(torch, dtype)
    # Other shapes are let through to be reported by name: `check` refuses them with the rest.
    with _named(f"{directory}: transformers cannot load it", directory):
        model, info = loader.from_pretrained(
            directory,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_dtype(wanted),
            **_local(remote),
        )
    check(info, directory)
    return model.to(chosen_device(device)).eval()


def takes_images(directory: Path, remote: bool = False) -> bool:
    """Return whether the model of a directory is one that takes images.

    Raises:
        SideError: there is no such class.
    """
    return auto_class(config_of(directory, remote), directory)[1]


def _local(remote: bool) -> dict[str, bool]:
    """Return how a directory is read: nothing is fetched, and its code is trusted or not."""
    return {"local_files_only": True, "trust_remote_code": remote}


def config_of(directory: Path, remote: bool = False) -> Any:
    """Return the config in a directory.

    Raises:
        SideError: transformers cannot read it, or knows no such model.
    """
    with _named(f"{directory}: transformers cannot read its config"):
        return transformers.AutoConfig.from_pretrained(directory, **_local(remote))


@contextmanager
def _named(what: str, inspected: Path | None = None) -> Iterator[None]:
    """Say what has failed where transformers, or a library below it, only says how."""
    try:
        yield
    except (SideError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        advice = f"; 'ckptx inspect {inspected}' says whether its files are whole"
        raise SideError(f"{what}: {first_sentence(error)}{advice if inspected else ''}") from error


def unfilled(directory: str, dtype: str) -> Any:
    """Return the model of the config in a directory, on the CPU, to be given its weights by name.

    Raises:
        SideError: there is no such class.
    """
    config = config_of(Path(directory))
    loader, _ = auto_class(config, Path(directory))
    return loader.from_config(config, **_dtype(getattr(torch, dtype)))


def _dtype(wanted: Any) -> dict[str, Any]:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": wanted}


def check(info: Mapping[str, Any], directory: Path) -> None:
    """Refuse a model of which weights are missing or left over.

    A tied output layer is not missing: transformers takes it off the list once it is tied.

    Raises:
        SideError: it names them.
    """
    for kind, meaning in _FAULTS.items():
        found = info.get(kind) or ()
        names = sorted(str(one[0] if isinstance(one, tuple) else one) for one in found)
        if names:
            raise SideError(
                f"{directory}: transformers says of {len(names)} tensors that they {meaning}: "
                f"{listing(names)}"
            )


def auto_class(config: Any, directory: Path) -> tuple[Any, bool]:
    """Return the auto class for a config, and whether it is that of models that take images.

    The class that the config names decides; its ``auto_map``, where transformers has no such class.

    Raises:
        SideError: it is neither a causal language model nor one with images.
    """
    named = list(getattr(config, "architectures", None) or [])
    of_images = dict(getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {}))
    of_text = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    own = getattr(config, "auto_map", None) or {}
    if not named:
        named = [of_text.get(config.model_type) or of_images.get(config.model_type, "")]
    if set(named) & set(_flat(of_text.values())) or "AutoModelForCausalLM" in own:
        return transformers.AutoModelForCausalLM, False
    if set(named) & set(_flat(of_images.values())) or "AutoModelForImageTextToText" in own:
        return transformers.AutoModelForImageTextToText, True
    raise SideError(
        f"{directory}: {', '.join(named) or 'its class'} is neither a causal language model nor "
        "one with images that transformers knows, so nothing can be generated"
    )


def _flat(names: Any) -> list[str]:
    return [one for name in names for one in (name if isinstance(name, tuple | list) else [name])]


def chosen_device(device: str) -> str:
    """Return ``cpu`` or ``cuda``.

    Raises:
        SideError: CUDA is asked for and torch has none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SideError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device


def tokenizer_of(directory: Path, remote: bool = False) -> Any:
    """Return the tokenizer in a directory, None if there is none.

    Asked without looking, transformers makes one with an empty vocabulary.
    """
    if not holds_tokenizer(directory):
        return None
    with _named(f"{directory}: transformers cannot read its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(directory, **_local(remote))
