"""One ``.pt`` file that holds the state dict of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import click

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import Namespace
from ckptx.containers.sharded import is_sharded
from ckptx.containers.torch_zip import stored_bytes
from ckptx.conversion.options import option
from ckptx.errors import FormatError, SchemaError, listing
from ckptx.hf_models.directory import base_sidecars, sidecars, training_state
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.weights import Weights, fill_from_base
from ckptx.hf_models.wrappers import file_names, name_options
from ckptx.model.layout import Parts
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.plugins.pytorch import containers
from ckptx.plugins.pytorch.module_names import shapes_of_config, trained_messages
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import inventory, main_dtype, named_messages, passthrough
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Messages
from ckptx.protocol.model import Model, collect, named_tensors
from ckptx.protocol.sidecars import read_config
from ckptx.registry.families import family_named, family_of, hf_tensors, parts_from_config
from ckptx.schemas.conventions import legacy
from ckptx.schemas.megatron_settings.args import args_from_spec, args_of, spec_from_args
from ckptx.storage.file_plan import literal_files
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor, Stored

FSDP_MODEL_NAME = "pytorch_model_fsdp"
"""What accelerate and Trainer call a model that FSDP has gathered (FULL_STATE_DICT)."""
DIRECTORY_FILE = "model.pt"
"""The file of a target that is a directory."""
LAYOUTS = ("auto", "hf", "core", "legacy")

_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
_LOCAL_SHARDS = "local_shard_checkpoint"
_CONVENTIONS = {"hf": "hf", "core": "mcore", "legacy": "legacy"}


def layout_option() -> click.Option:
    """Return ``--layout``: how the tensors of a ``.pt`` file are named."""
    about = "Names in the .pt file; auto detects them, and writes Hugging Face's."
    return option("--layout", click.Choice(LAYOUTS), about, "auto")


def layout_option_value(options: Options) -> str | None:
    """Return the layout that was asked for, None for ``auto``."""
    layout: str | None = options.get("layout")
    return None if layout in (None, "auto") else layout


def layout_of(names: Iterable[str]) -> str:
    """Return the layout that names follow, by the first name that only one has."""
    for name in names:
        if name.startswith(("decoder.layers.", "embedding.word_embeddings")):
            return "core"
        if legacy.names_legacy(name):
            return "legacy"
    return "hf"


class PytorchLoader:
    """Reads the extents of the tensors from the file's own pickle; nothing of it is executed."""

    name = "pytorch"

    def options(self) -> list[click.Option]:
        """Return the options for the container, for names and for adapters."""
        return [
            layout_option(),
            containers.container_option(),
            *name_options(),
            *adapter_options(),
        ]

    def detect(self, source: Location) -> bool:
        """Return whether the source is a zip archive with a name that torch files have."""
        file = _file_of(source)
        if not file.is_file() or file.suffix not in _SUFFIXES:
            return False
        with file.open("rb") as stream:
            return stream.read(4) == b"PK\3\4"

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; names that no schema knows pass through."""
        given, source = source, _file_of(source)
        if not source.is_file():
            raise FormatError(f"{source}: expected one file of torch.save")
        if source.parent.name == _LOCAL_SHARDS:
            raise FormatError(
                f"{source}: is one rank's share; give the directory with those of all ranks, "
                f"{source.parent}"
            )
        value = torch_zip.read(source, 0)
        if not isinstance(value, Mapping):
            raise FormatError(f"{source}: expected a dictionary, found {type(value).__name__}")
        of_model = (source.parent / "config.json").is_file()  # not just any directory
        files = {**(sidecars(source.parent) if of_model else {}), **base_sidecars(context)}
        held = {path: one for path, one in containers.state_dicts(value).items() if _holds(one)}
        if not held:
            raise FormatError(
                f"{source}: holds no state dict of tensors ({listing(map(str, value))} found)"
            )
        path, remarks = containers.choose(
            {name: [*map(str, inner)] for name, inner in held.items()},
            options.get("container"),
            shapes_of_config(files, source.parent),
            source,
        )
        tensors = stored = _tensors(held[path], source)
        trainers = training_state(given) if given != source else ()
        try:
            others = (*_beside(held[path], stored), *containers.left(value, path), *trainers)
        except RecursionError as error:
            raise FormatError(f"{source}: its objects are nested too deeply") from error
        if layout_of(stored) == "hf":
            tensors, renamed = file_names(stored, options, source)
            remarks = (*remarks, *renamed)
        elif options.get("strip_prefix"):
            raise FormatError(f"{source}: --strip-prefix is for Hugging Face's names")
        weights = Weights([source], tensors, dict.fromkeys(tensors, source.name))
        filled = fill_from_base(weights, context)
        begin = Begin(
            format="pytorch",
            layout=layout_option_value(options) or layout_of(tensors),
            files=tuple(map(str, weights.paths)),
            sources=inventory(weights.tensors),
            root=str(source.parent),
            sidecars=files,
            training={"iteration": value.get("iteration", "release")},
        )
        version = value.get("checkpoint_version", 0)
        args = args_of(value, source)
        end = End(others, (*remarks, *filled))
        yield from _messages(begin, dict(weights.tensors), args, version, end, options, context)


def _holds(inner: Mapping[Any, Any]) -> bool:
    """Return whether a dictionary holds tensors, a legacy tree somewhere in it."""
    return "language_model" not in inner or bool(
        any(isinstance(one, Stored) for one in legacy.flattened(inner).values())
    )


def _tensors(inner: Mapping[Any, Any], source: Location) -> dict[str, Stored]:
    """Return the tensors of a state dict.

    Raises:
        FormatError: it is only one rank's part of it, or it holds none.
    """
    if "language_model" in inner:
        inner = legacy.flattened(inner)
    if shares := [name for name, entry in inner.items() if is_sharded(entry)]:
        raise FormatError(
            f"{source}: {shares[0]!r} is what one rank holds of a tensor; give the directory with "
            "the files of all ranks to --loader verl"
        )
    return {str(name): entry for name, entry in inner.items() if isinstance(entry, Stored)}


def _beside(inner: Mapping[Any, Any], tensors: Mapping[str, Any]) -> tuple[Dropped, ...]:
    """Return what lies among the tensors of a state dict, and is none."""
    if "language_model" in inner:
        inner = legacy.flattened(inner)
    others = {str(name): one for name, one in inner.items() if name not in tensors}
    states = [name for name in others if name.endswith("_extra_state")]
    found = [
        Dropped(name, TRAINING_STATE, stored_bytes(one))
        for name, one in others.items()
        if name not in states
    ]
    if held := [name for name in states if others[name] is not None]:
        found.append(Dropped(f"{len(held)} _extra_state objects", TRAINING_STATE))
    return tuple(found)


def _messages(
    begin: Begin,
    tensors: dict[str, LazyTensor],
    args: Mapping[str, Any],
    version: Any,
    end: End,
    options: Options,
    context: Context,
) -> Messages:
    convention = _CONVENTIONS[begin.layout]
    if convention == "hf":
        yield from trained_messages(begin, tensors, end, options, context)
        return
    config = read_config(begin.sidecars, begin.root)
    family = family_of(config) if config else None
    if begin.layout == "legacy":
        args = legacy.completed(args)
    parts: Parts
    if args:
        parts = {"language": spec_from_args(args)}
    elif family is not None and config is not None:
        parts = parts_from_config(family, config)
    else:
        yield begin
        yield passthrough(tensors)
        note = "no config or args name the model: tensors pass through by name"
        yield replace(end, notes=(*end.notes, note))
        return
    composed = family.name if family is not None and "vision" in parts else ""
    layout = family_named(composed or parts["language"].family).layout(convention)
    if begin.layout == "legacy":
        layout = legacy.ordered(layout, version, parts["language"])
    training = {**begin.training, "args": args or None}
    begin = replace(begin, training=training, family=composed)
    yield from named_messages(begin, tensors, parts, layout, end.notes, end.dropped)


def _file_of(source: Location) -> Location:
    """Return the file that is meant: in a directory that of the saver, or of accelerate.

    Source: huggingface/accelerate src/accelerate/utils/fsdp_utils.py (save_fsdp_model) @ v1.15.0.
    """
    if not source.is_dir():
        return source
    names = (DIRECTORY_FILE, f"{FSDP_MODEL_NAME}.bin")
    return next((source / name for name in names if (source / name).is_file()), source / names[0])


class PytorchSaver:
    """Writes a ``.pt`` file, or a directory with ``model.pt`` and the model's small files."""

    name = "pytorch"

    def options(self) -> list[click.Option]:
        """Return ``--layout`` and ``--target-layout``."""
        about = "Names in the target, where --layout is about the source."
        return [
            layout_option(),
            option("--target-layout", click.Choice(["hf", "core", "legacy"]), about),
        ]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of one file; a target without a file's suffix becomes a directory."""
        model = collect(messages)
        value, tensors, dropped = _state(model, options)
        target = context.target
        single = target is not None and target.suffix in _SUFFIXES
        name = target.name if single and target is not None else DIRECTORY_FILE
        files = [torch_zip.plan_file(name, value)]
        notes: tuple[str, ...] = ()
        if not single:
            files += literal_files(model.begin.sidecars)
        elif left := sorted(model.begin.sidecars):
            notes = (f"one file cannot hold {', '.join(left)}; name a directory to keep them",)
        place = "{target}" if single else f"{{target}}/{DIRECTORY_FILE}"
        return SavePlan(
            files,
            single_file=single,
            dropped=dropped,
            notes=notes,
            load_hint=f'torch.load("{place}", weights_only=True)',
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )


def _state(
    model: Model, options: Options
) -> tuple[dict[str, Any], Mapping[str, LazyTensor], tuple[Dropped, ...]]:
    """Return what the file holds, its tensors, and what was dropped."""
    layout = options.get("target_layout") or layout_option_value(options)
    if model.passthrough is not None:
        if layout is not None and not model.begin.layout.startswith(layout):
            raise SchemaError(
                f"tensors are named as {model.begin.layout} and no schema knows their model, so "
                f"they cannot be written as {layout}; give --hf-base with a config"
            )
        return dict(model.passthrough), model.passthrough, ()
    spec = model.spec
    family = family_named(model.family)
    if layout in ("core", "legacy") and family.composition is not None:
        raise SchemaError(
            f"a {family.name} under Megatron's names is no single state dict; use --to llava "
            "--ckpt-format torch"
        )
    if layout not in ("core", "legacy"):
        tensors, dropped = hf_tensors(model)
        return dict(tensors), tensors, dropped
    old = layout == "legacy"
    named = family.layout("legacy" if old else "mcore")
    if old:
        legacy.check(spec)
    tensors, dropped = named_tensors(model, named)
    rows = model.messages["embeddings"]["word embeddings"].shape[0]
    args = args_from_spec(
        spec,
        tp=1,
        pipeline=Pipeline(),
        padded_vocab_size=rows,
        true_vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=1,
        iteration=0,
        transformer_impl="local" if old else "transformer_engine",
        ckpt_format="torch",
        source_args=model.begin.training.get("args"),
    )
    if old:
        args |= legacy.to_args(spec)
    state = {"args": Namespace(**args), "checkpoint_version": legacy.VERSION, "iteration": 0}
    held = legacy.nested(tensors) if old else dict(tensors)
    return {**state, "model": held}, tensors, dropped
