"""LoRA adapters among the weights of a Megatron checkpoint: merged, or kept as peft saves them.

    X.weight             X.adapter.linear_in.weight    X.adapter.linear_out.weight    Bridge, verl
    X.base_layer.weight  X.lora_A.default.weight       X.lora_B.default.weight        ms-swift

A is [rank, in] and B [out, rank], with the rows of ``X.weight``: those of a fused weight have one A
in common. Of a layer that is cut by rows B is cut alike, and Bridge cuts A along the rank; of one
that is cut by columns A is cut alike, and Bridge cuts B by rows.

Source: NVIDIA-NeMo/Megatron-Bridge src/megatron/bridge/peft/{lora,utils,adapter_wrapper}.py
@ 0361921; huggingface/peft src/peft/tuners/lora/tp_layer.py @ v0.21.2, whose names ms-swift has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click

from ckptx.conversion.options import option
from ckptx.errors import FormatError, SchemaError, listing
from ckptx.hf_models.lora.config import AdapterConfig
from ckptx.hf_models.lora.export import exported
from ckptx.hf_models.lora.extract import LAYOUT, Adapter, ExtractedAdapters
from ckptx.model.layout import Layout, Parts, Rule, Spelling, rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import FUSED_QKV, GLU, IDENTITY, QKV
from ckptx.plugins.megatron.source import Source
from ckptx.plugins.megatron.writers import bridge
from ckptx.protocol.context import Context, Options
from ckptx.protocol.from_names import passthrough
from ckptx.protocol.messages import Begin, Dropped, End, Message, Tensors
from ckptx.protocol.sidecars import dump_config
from ckptx.registry.families import family_named
from ckptx.schemas.megatron_settings import row_blocks
from ckptx.schemas.megatron_settings.llava import is_llava
from ckptx.tensors.dtypes import DTYPES, dtype_name
from ckptx.tensors.lazy import LazyTensor
from ckptx.tensors.low_rank import updated

_A, _B = " lora A", " lora B"
_NAMES = {
    _A: (".adapter.linear_in.weight", ".lora_A.default.weight"),
    _B: (".adapter.linear_out.weight", ".lora_B.default.weight"),
}
_SETTINGS = ("lora_alpha", "lora_rank", "use_rslora")
"""The args of ms-swift that say the scale."""
_MARKS = (".adapter.", ".lora_", ".modules_to_save.")
_WRAPPER = re.compile(r"^(module\.)+|\.(base_layer|to_wrap)(?=\.)")
"""What NeMo 2 and data parallelism put before names, and adapters into them."""
_LAYER = re.compile(r"layers\.(\d+|\{layer\})\.")
_ROWS_KEPT = (IDENTITY, QKV, FUSED_QKV, GLU)
"""Transforms that move rows and nothing else, so that they do to B what they do to a weight."""


def lora_alpha_option() -> click.Option:
    """Return ``--lora-alpha``."""
    about = "The lora_alpha of LoRA weights in the source.  [as its args or run_config.yaml say]"
    return option("--lora-alpha", float, about)


def unwrapped(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rank's tensors under the names that they have without wrappers.

    Examples:
        >>> list(unwrapped({"mlp.linear_fc1.base_layer.weight": 1, "mlp.linear_fc2.weight": 2}))
        ['mlp.linear_fc1.weight', 'mlp.linear_fc2.weight']
    """
    found = {_WRAPPER.sub("", name): entry for name, entry in named.items()}
    if len(found) < len(named):
        twice = [name for name in named if _WRAPPER.sub("", name) != name]
        raise SchemaError(
            f"{listing(twice)} are there twice, with and without a wrapper (LoRA's, or module.)"
        )
    return found


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapter of a checkpoint."""

    checkpoint: Source
    ranks: Mapping[str, int]
    """The rank of every kind of module, by its name without the layer's number."""
    alone: bool
    """Whether nothing of the model itself is there."""
    config: AdapterConfig
    dtype: str | None
    """The dtype that the model is to have, if it is known."""
    is_merged: bool
    """Whether it is to be merged into the model, not kept alone."""

    @property
    def args(self) -> dict[str, Any]:
        """The checkpoint's args without those that say the scale, which is known."""
        return {name: one for name, one in self.checkpoint.args.items() if name not in _SETTINGS}

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the checkpoint, and on the merge."""
        ranks = sorted(set(self.ranks.values()))
        said = ", ".join(f"rank {rank} x {self.config.scale('', rank):g}" for rank in ranks)
        merged = f"LoRA was merged into {', '.join(sorted(self.ranks))} ({said})"
        return (*self.checkpoint.notes, merged)

    def messages(self, layout: Layout, parts: Parts) -> Iterator[Tensors]:
        """Yield the model with the adapter merged into its weights."""
        return map(self._merged, self.checkpoint.messages(self._layout(layout), parts))

    def _layout(self, layout: Layout) -> Layout:
        """Return a layout with the adapter's matrices; without a model with nothing else."""
        sections = []
        for section in layout.sections:
            own = () if self.alone else section.rules
            matrices = (one for entry in section.rules for one in self._matrices(entry))
            sections.append(replace(section, rules=(*own, *matrices)))
        return replace(layout, sections=tuple(sections))

    def _matrices(self, entry: Rule) -> Iterator[Rule]:
        """Yield the rules of the matrices of a weight, if it has any."""
        for spelling in entry.spellings:
            module = spelling.names[0].removesuffix(".weight")
            rank = self.ranks.get(_LAYER.sub("layers.", module))
            if rank is None or entry.ep is not None or entry.tp not in (0, 1):
                continue
            by_rows = entry.tp == 0
            first, *others = ((module + name,) for name in _NAMES[_B])
            transform = spelling.transform if by_rows else IDENTITY
            yield replace(
                entry,
                keys=tuple(key + _B for key in entry.keys),
                spellings=tuple(Spelling(names, transform) for names in (first, *others)),
                tp=0 if by_rows else None,
                rows=None if by_rows else _hidden,
            )
            name, *more = (module + name for name in _NAMES[_A])
            yield replace(
                rule(_shared(entry.keys[0]), name, tp=None if by_rows else 1, also=more),
                when=entry.when,
                layers=entry.layers,
                rows=partial(_rank, rank) if by_rows else None,
            )
            return

    def _merged(self, message: Tensors) -> Tensors:
        """Return a message with the adapter merged into its weights."""
        tensors = dict(message.tensors)
        for key, left in message.tensors.items():
            if not key.endswith(_B):
                continue
            del tensors[key]
            base = key.removesuffix(_B)
            right = message.tensors[_shared(base)]
            tensors.pop(_shared(base), None)
            weight = tensors[base]
            if self.dtype and self.dtype != weight.dtype and weight.dtype in DTYPES:
                weight = weight.cast("float32")  # rounded once, with the rest of the model
            label = f"{message.name}: {base}"
            scale = self.config.scale(label, right.shape[0])
            try:
                tensors[base] = updated(weight, left, right, scale, weight.dtype)
            except SchemaError as error:
                raise SchemaError(f"{self.checkpoint.place}: {label}: {error}") from error
        return replace(message, tensors=tensors)

    def exported(
        self, begin: Begin, layout: Layout, parts: Parts, notes: tuple[str, ...]
    ) -> Iterator[Message]:
        """Yield the adapter alone, under Hugging Face's names."""
        spec = parts["language"]
        # Without a model there is no embedding to share.
        own = {**parts, "language": replace(spec, tied=False)} if self.alone else parts
        found = self.checkpoint.messages(self._layout(layout), own)
        tensors: dict[str, LazyTensor] = {}
        held = {message.name: message.tensors for message in found}
        for group in family_named(spec.family).layout("hf").held(parts):
            for entry in group.rules:
                tensors |= self._named(entry, held.get(group.message, {}), group.layer, parts)
        base = tuple(
            tensor
            for own in held.values()
            for key, tensor in own.items()
            if not key.endswith((_A, _B))
        )
        adapter = Adapter(tensors, self.config, str(self.checkpoint.place))
        named, config, _, more = exported(
            ExtractedAdapters(begin, {}, [adapter]), {"architectures": [spec.architecture]}
        )
        left = [Dropped("the base model", "only the adapter is converted", 0, base)] * bool(base)
        files = {"adapter_config.json": dump_config(config)}
        yield replace(begin, layout=LAYOUT, parts={}, sidecars=files)
        yield passthrough(named)
        yield End((*self.checkpoint.dropped, *left), (*notes, *self.checkpoint.notes, *more))

    def _named(
        self, entry: Rule, own: Mapping[str, LazyTensor], layer: int | None, parts: Parts
    ) -> dict[str, LazyTensor]:
        """Return the matrices of a rule of Hugging Face's, by name."""
        lefts = [own[key + _B] for key in entry.keys if key + _B in own]
        if not lefts:
            return {}
        rights = {id(own[_shared(key)]): own[_shared(key)] for key in entry.keys}
        spelling = entry.spellings[0]
        names = spelling.named(layer, 0)
        spec = parts["language"]
        kept = len(lefts) == len(entry.keys) and len(rights) == 1
        if not kept or spelling.transform not in _ROWS_KEPT:
            raise SchemaError(
                f"{self.checkpoint.place}: the adapter of {listing(names, 2)} cannot be one of "
                "layers that transformers has; merge it: --to hf"
            )
        (right,) = rights.values()
        found = {}
        for name, left in zip(names, spelling.transform.pack(lefts, spec, 1), strict=True):
            path = name.removesuffix(".weight")
            rows = spec.vocab_size if "weight" in entry.keys else None  # of the output layer
            found[f"{path}.lora_A.weight"] = right
            found[f"{path}.lora_B.weight"] = left.narrow(0, 0, rows) if rows else left
        return found


def _hidden(spec: ModelSpec) -> int:
    return spec.hidden_size


def _rank(rank: int, _: ModelSpec) -> int:
    return rank


def _shared(key: str) -> str:
    """Return the key of the matrix A of a weight, which gate and up have in common."""
    return key.removesuffix(" W").removesuffix(" V") + _A


def adapters_of(checkpoint: Source, options: Options, context: Context) -> Adapters | None:
    """Return the adapter of a checkpoint, None where it has none.

    Raises:
        FormatError: it is of a kind that is not merged, its alpha is not known, or its model is
            wanted and not there.
    """
    alpha, place = options.get("lora_alpha"), checkpoint.place
    names = [name for name in checkpoint.names if any(mark in name for mark in _MARKS)]
    if not names:
        if alpha is not None:
            raise FormatError(f"--lora-alpha: {place} holds no LoRA weights")
        return None
    ends = tuple(name for kind in _NAMES.values() for name in kind)
    other = [name for name in names if not name.endswith(ends) or "experts." in name]
    if other:
        raise FormatError(
            f"{place}: holds adapters of a kind that is not merged here ({listing(other, 2)}; "
            "merged are LoRA's matrices of linear layers, not of experts, DoRA or parts of a fused "
            "layer); merge them with the framework that wrote them"
        )
    if is_llava(checkpoint.weights) or row_blocks.notes(checkpoint.args):
        raise FormatError(
            f"{place}: LoRA in a model with a vision tower, or with gate and up rows in blocks, is "
            "not merged here; merge it with the framework that trained it"
        )
    alone = len(names) == len(checkpoint.names)
    if alone and not context.wants.adapters:
        raise FormatError(
            f"{place}: holds a LoRA adapter alone, without the model that it was trained on; "
            "convert it --to peft, then that directory with --hf-base and the model"
        )
    ranks: dict[str, int] = {}
    for name, tensor in checkpoint.weights.items():
        for end in _NAMES[_B]:
            if name.endswith(end):
                ranks[_LAYER.sub("layers.", name.removesuffix(end))] = tensor.shape[-1]
    config = _config(checkpoint, alpha)
    for rank in ranks.values():
        config.scale("", rank)
    dtype = dtype_name(context.dtype) if context.dtype else None
    return Adapters(checkpoint, ranks, alone, config, dtype, context.wants.weights and not alone)


def _config(checkpoint: Source, alpha: float | None) -> AdapterConfig:
    """Return what is known of the scale: by the user, ms-swift's args, or Bridge's run_config."""
    said: dict[str, Any] = {"peft_type": "LORA"}
    path = checkpoint.place / bridge.RUN_CONFIG
    args = checkpoint.args
    if path.is_file():
        peft = bridge.section(path, "peft")
        said |= {"lora_alpha": peft.get("alpha"), "r": peft.get("dim")}
        place = str(path)
    else:
        said |= {"lora_alpha": args.get("lora_alpha"), "r": args.get("lora_rank")}
        said["use_rslora"] = bool(args.get("use_rslora"))
        place = f"{checkpoint.place}{': args' if args else ''}"
    if alpha is not None:
        said["lora_alpha"], place = alpha, "--lora-alpha"
    return AdapterConfig(said, place)
