"""Load a directory of `torch.distributed.checkpoint`, as FSDP, RLinf, accelerate and others write.

A checkpoint holds a nested dictionary, flattened. The path of every entry in it is in the metadata,
so a container (``app``, ``model``) is told from the first module of a name without guessing. Names
are those of Hugging Face, with what wrappers of the model have put into them.

Source: torch:torch/distributed/checkpoint/{metadata,default_planner}.py @ v2.13.0; prefixes as
huggingface/accelerate src/accelerate/utils/fsdp_utils.py @ v1.15.0 and RLinf/RLinf
rlinf/hybrid_engines/fsdp/ @ main write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptx.adapters import adapter_options
from ckptx.containers import dcp
from ckptx.containers.dcp_metadata import METADATA_NAME
from ckptx.errors import FormatError, listing
from ckptx.hookspecs import hookimpl
from ckptx.loading import inventory
from ckptx.model_directory import base_sidecars, hf_messages
from ckptx.plugin import Loader
from ckptx.plugins.trained import WEIGHTS_ONLY, beside, unwrapped
from ckptx.protocol import Begin, Dropped, Message

TRAINING = ("optim", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "rng", "scheduler")
"""Words of a path that say: state of the training, not weights."""
_MEGATRON = ("decoder.layers.", "embedding.word_embeddings.")
_MEGATRON_FSDP = ("model.module.decoder.", "model.module.embedding.")


class DcpLoader:
    """Reads the chunks where they lie; no process group, no model."""

    name = "dcp"
    capabilities: Mapping[str, Any] = {
        "formats": ["torch.distributed.checkpoint"],
        "layouts": ["hf"],
        "passthrough": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for the container and for adapters."""
        return [
            click.Option(
                ["--container"],
                help="Path of the model in the saved dictionary, as 'app.model'.  "
                "[default: the one that holds weights]",
            ),
            *adapter_options(),
        ]

    def detect(self, source: Path) -> bool:
        """Return whether there is metadata, or was about to be, and not Megatron's besides."""
        known = (source / METADATA_NAME).is_file() or _is_unfinished(source)
        return known and not (source / "metadata.json").exists()

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model; names that no schema knows pass through."""
        if _is_unfinished(source):
            raise FormatError(
                f"{source}: holds .distcp files and no {METADATA_NAME}, which is written last: the "
                "save was not finished; use an earlier one"
            )
        metadata = dcp.read_metadata(source)
        _refuse_megatron(metadata, source)
        container, names = _model(metadata, options.get("container"), source)
        files: list[str] = []
        stored = dcp.tensors(metadata, files, names)
        weights = unwrapped({names[key]: tensor for key, tensor in stored.items()}, source)
        begin = Begin(
            format=self.name,
            layout="hf",
            parts={},
            files=tuple(files),
            sources=inventory(stored),
            root=str(source),
            sidecars={**beside(source), **base_sidecars(options)},
            training={"iteration": "release", "container": container},
        )
        dropped = _left(metadata, names)
        notes = (f"the weights are those of {container!r}",) if container else ()
        yield from hf_messages(begin, weights, notes, options.get("dtype"), dropped, options)


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
    return tuple(Dropped(group, WEIGHTS_ONLY, size) for group, size in sizes.items())


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(DcpLoader())
