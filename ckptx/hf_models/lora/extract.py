r"""LoRA adapters: found, and taken apart from the weights that they belong to.

       source tensors ---+--> base, under the names that it has without peft --+
    --adapter, --adapter |                                                     +--> merged, or
                         +--> adapters: matrices, saved modules, config -------+    exported

`ckptx.hf_models.lora.merge` merges them, `ckptx.hf_models.lora.export` keeps the adapter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from ckptx.errors import FormatError, listing
from ckptx.hf_models.lora import config as adapter_config
from ckptx.hf_models.lora import names as adapter_names
from ckptx.hf_models.lora.config import ADAPTER_CONFIG, AdapterConfig
from ckptx.hf_models.weights import Weights
from ckptx.hf_models.wrappers import unwrapped
from ckptx.protocol.context import Options
from ckptx.protocol.from_names import inventory
from ckptx.protocol.messages import Begin
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

FILES = ("adapter_model.safetensors", "adapter_model.bin")
LAYOUT = "peft"
"""The layout of passthrough tensors that are an adapter's own."""


def adapter_options() -> list[click.Option]:
    """Return the options of loaders that read models under Hugging Face's names."""
    directory = click.Path(exists=True, file_okay=False, resolve_path=True)
    adapter = (
        "LoRA adapter, as peft saves it, to merge into the weights. Repeatable: merged one after "
        "another."
    )
    alpha = f"The lora_alpha of LoRA weights in the source.  [as {ADAPTER_CONFIG} says]"
    return [
        click.Option(["--adapter"], type=directory, help=adapter, multiple=True, metavar="DIR"),
        click.Option(["--lora-alpha"], type=float, help=alpha),
    ]


@dataclass(frozen=True, slots=True)
class Adapter:
    """The tensors of an adapter under the names of its own file, without their prefix."""

    tensors: Mapping[str, LazyTensor]
    config: AdapterConfig
    place: str

    def names(self) -> dict[str, adapter_names.Name]:
        """Return what the names of its tensors say."""
        return {key: adapter_names.parse(key) for key in self.tensors}

    def ranks(self) -> dict[str, int]:
        """Return the modules that have matrices, and the ranks of these."""
        first = (f"{adapter_names.MATRICES[0]}.weight", adapter_names.VECTORS[0])
        said = self.names().items()
        return {name.module: self.tensors[k].shape[0] for k, name in said if name.kind in first}


@dataclass(slots=True)
class ExtractedAdapters:
    """A source taken apart."""

    begin: Begin
    tensors: dict[str, LazyTensor]
    """The base, under the names that it has without peft."""
    adapters: list[Adapter] = field(default_factory=list)
    inside: bool = False
    """Whether the first adapter lay among the source's own tensors."""


def extract_adapters(
    begin: Begin, tensors: Mapping[str, LazyTensor], options: Options
) -> ExtractedAdapters:
    """Return the base and the adapters of a source and of ``--adapter``.

    Raises:
        FormatError: several adapters lie in one model, their alpha is unknown, or a directory that
            the user names holds none.
    """
    alpha = options.get("lora_alpha")
    found = ExtractedAdapters(begin, dict(tensors))
    # A finished model may have such names of its own, as Phi-4-multimodal has.
    finished = begin.format == "hf" and alpha is None
    if any(map(_wrapped if finished else adapter_names.speaks_peft, tensors)):
        found.tensors, inside = _inside(tensors, begin.root)
        if inside:
            found.inside = True
            config = adapter_config.of_checkpoint(Path(begin.root), alpha)
            found.adapters.append(Adapter(inside, config, begin.root))
    for directory in options.get("adapter") or ():
        _add_directory(Path(directory), alpha, found)
    if alpha is not None and not found.adapters:
        raise FormatError(f"--lora-alpha: {begin.root} holds no LoRA weights")
    if ADAPTER_CONFIG in begin.sidecars:
        # transformers would look for the adapter beside the weights.
        rest = {name: data for name, data in begin.sidecars.items() if name != ADAPTER_CONFIG}
        found.begin = replace(found.begin, sidecars=rest)
    return found


def _wrapped(name: str) -> bool:
    return name.startswith(adapter_names.PREFIX)


def _inside(
    tensors: Mapping[str, LazyTensor], root: str
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Return the base and the adapter that a live model's state dict holds."""
    base: dict[str, LazyTensor] = {}
    adapter: dict[str, LazyTensor] = {}
    known: set[str] = set()
    for name, tensor in tensors.items():
        said = adapter_names.parse(name)
        target, key = (adapter, said.file_key) if said.kind else (base, said.path)
        if key in target:
            other = f" of adapters {' and '.join(sorted({*known, said.adapter}))}"
            raise FormatError(
                f"{root}: {name!r} and another tensor are both {key!r}"
                f"{other if said.kind else ''}; only one adapter can be merged"
            )
        known |= {said.adapter} if said.adapter else set()
        target[key] = tensor
    if len(known) > 1:
        raise FormatError(
            f"{root}: holds the adapters {listing(sorted(known))}; only one can be converted: save "
            "the checkpoint with the others deleted"
        )
    return base, adapter


def _add_directory(directory: Location, alpha: float | None, found: ExtractedAdapters) -> None:
    adapter, paths = read_directory(directory, alpha, len(found.begin.files))
    found.begin = replace(
        found.begin,
        files=(*found.begin.files, *map(str, paths)),
        sources=(
            *found.begin.sources,
            *inventory(adapter.tensors, f"{directory.name or directory}: "),
        ),
    )
    found.adapters.append(adapter)


def read_directory(
    directory: Location, alpha: float | None, first: int
) -> tuple[Adapter, list[Location]]:
    """Return the adapter in a directory, and its files, which are numbered from ``first`` on.

    Raises:
        FormatError: it holds none, or one that cannot be merged.
    """
    path = directory / ADAPTER_CONFIG
    files = [directory / name for name in FILES if (directory / name).is_file()]
    if not path.is_file() or not files:
        lacking = ADAPTER_CONFIG if not path.is_file() else f"neither {' nor '.join(FILES)}"
        raise FormatError(f"{directory}: no adapter that peft has saved: lacks {lacking}")
    config = adapter_config.read(path)
    config.refuse_residual()
    if alpha is not None:
        config = replace(config, said={**config.said, "lora_alpha": alpha, "alpha_pattern": {}})
    weights = Weights([], {}, {})
    weights.add(files[0].absolute())
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in weights.tensors.items():
        key = adapter_names.parse(unwrapped(name)).file_key
        if key in tensors:
            raise FormatError(f"{files[0]}: {name!r} and another tensor are both {key!r}")
        tensors[key] = replace(tensor, file=tensor.file + first)
    if not any(tensor.numel for tensor in tensors.values()):
        raise FormatError(
            f"{files[0]}: holds no LoRA matrix{' of any element' if tensors else ''}: the adapter "
            "was not saved (under ZeRO-3 its tensors must be gathered first); take it from the "
            "training checkpoint"
        )
    return Adapter(tensors, config, str(directory)), weights.paths
