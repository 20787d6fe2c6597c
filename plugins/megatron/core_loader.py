"""Load a Megatron Core checkpoint, ``torch_dist`` or per rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.hf_models.directory import base_sidecars, sidecars
from ckptx.model.canonical_names import check_shapes
from ckptx.model.layout import Layout, Parts
from ckptx.model.pipeline_parallel import Pipeline
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import directory, llava, per_rank, torch_dist
from ckptx.plugins.megatron.forms import LEGACY, Generation
from ckptx.plugins.megatron.options import (
    CAPABILITIES,
    transformer_impl_option,
    true_vocab_size,
    vocabulary_options,
)
from ckptx.plugins.megatron.source import Source
from ckptx.protocol.contracts import Loader
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, End, Message
from ckptx.protocol.sidecars import CONFIG, read_config
from ckptx.registry.families import (
    family_named,
    family_of,
    family_of_names,
    note_of,
    parts_from_config,
)
from ckptx.schemas.megatron_settings.args import NOTE, spec_from_args, unsupported_by_megatron
from ckptx.schemas.megatron_settings.llava import is_llava, language_args


class CoreLoader:
    """Reads what Megatron Core writes, at any tensor and pipeline parallel size."""

    name = "core"
    capabilities = CAPABILITIES

    def options(self) -> list[click.Option]:
        """Return the options for the vocabulary."""
        return [*vocabulary_options(), transformer_impl_option("loader")]

    def detect(self, source: Path) -> bool:
        """Return whether there is a tracker file or an iteration directory, of no legacy model."""
        return directory.looks_like(source) and found_form(source) is not LEGACY

    def load(self, source: Path, options: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the model."""
        if options.get("fill_from_base"):
            raise FormatError(
                "--fill-from-base fills tensors by their Hugging Face names, which a Megatron "
                "source has not; convert it to hf first, then fill"
            )
        place = directory.find(source)
        checkpoint = self.read(place)
        beside = place.path / directory.SIDECARS
        files = {**(sidecars(beside) if beside.is_dir() else {}), **base_sidecars(options)}
        config = read_config(files, beside)
        family = family_of(config) if config else None
        said = parts_from_config(family, config) if config and family else None
        dropped = list(checkpoint.dropped)
        parts: Parts = {"language": _spec(checkpoint, said, options)}
        seeing = is_llava(checkpoint.weights)
        if seeing:
            known = said if said and "vision" in said else None
            if known is None:
                files.pop(CONFIG, None)  # the language model's own says nothing of the whole
            parts, dummies = llava.parts_of(checkpoint, known, parts["language"])
            _check_dummies(options, dummies, checkpoint)
            layout = family_named(llava.FAMILY).layout("mcore")
            stored = checkpoint.messages(layout, llava.stored_parts(parts, dummies))
            messages = list(llava.without_dummies(stored, parts["vision"], dummies, dropped))
        else:
            layout = self.layout(checkpoint, parts["language"])
            messages = list(checkpoint.messages(layout, parts))
        yield Begin(
            format=self.name,
            layout=layout.name,
            parts=parts,
            family=llava.FAMILY if seeing else "",
            files=checkpoint.files,
            sources=checkpoint.sources,
            root=str(place.path),
            sidecars=files,
            training={
                "iteration": place.iteration,
                "args": checkpoint.args,
                "consumed_train_samples": checkpoint.args.get("consumed_train_samples"),
                "consumed_valid_samples": checkpoint.args.get("consumed_valid_samples"),
            },
            parallel={
                "tp": checkpoint.args.get("tensor_model_parallel_size") or 1,
                "ep": checkpoint.args.get("expert_model_parallel_size") or 1,
                "etp": checkpoint.args.get("expert_tensor_parallel_size"),
                "pipeline": Pipeline.from_args(checkpoint.args),
                "ckpt_format": place.format,
            },
        )
        for message in messages:
            check_shapes(message.name, message.tensors, parts[message.part])
            yield message
        yield End(tuple(dropped), (*directory.unfinished(source), *self.notes(parts["language"])))

    def read(self, place: directory.IterationDirectory) -> Source:
        """Read the metadata of a checkpoint."""
        if place.format == "torch_dist":
            return torch_dist.read(place)
        return per_rank.read(place)

    def layout(self, checkpoint: Source, spec: ModelSpec) -> Layout:
        """Return how a model is named."""
        return family_named(spec.family).layout("mcore")

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return remarks on a model that was found."""
        return family_named(spec.family).megatron.head_notes(spec)


def found_form(source: Path) -> Generation | None:
    """Return which kind of model a per-rank checkpoint holds, None where that cannot be told."""
    try:
        place = directory.find(source)
        return per_rank.form_in(place) if place.format == "torch" else None
    except CkptxError:
        return None  # the loader will say what is wrong


def _check_dummies(options: Mapping[str, Any], dummies: int, checkpoint: Source) -> None:
    said = options.get("vit_dummy_head_count")
    if said and said != dummies:
        raise SchemaError(
            f"{checkpoint.place}: --vit-dummy-head-count is {said}, the weights have {dummies}; "
            "leave the option out"
        )


def _spec(checkpoint: Source, said: Parts | None, options: Mapping[str, Any]) -> ModelSpec:
    """Return the language model's dimensions: args say what was trained, a config the rest."""
    named = said["language"] if said else None
    args = language_args(checkpoint.args)
    if not args:
        if named is None:
            raise SchemaError(
                f"{checkpoint.place}: holds no args that describe the model; give --hf-base with a "
                "config of a known architecture"
            )
        spec = named
    else:
        if named is None and (recognised := family_of_names(checkpoint.names)):
            args = {**args, NOTE: {**note_of(recognised), **(args.get(NOTE) or {})}}
        spec = spec_from_args(args, named.family if named else None)
        if named is not None:
            # What args cannot say comes from the config; where both speak, args were trained with.
            spec = replace(
                spec,
                architecture=named.architecture,
                vocab_size=named.vocab_size,
                rotary_scaling=spec.rotary_scaling or named.rotary_scaling,
                extra={**named.extra, **spec.extra},
            )
            if problems := unsupported_by_megatron(spec):
                raise SchemaError(
                    f"{checkpoint.place}: the config at hand is not of this model: "
                    f"{'; '.join(problems)}"
                )
    spec = family_named(spec.family).megatron.from_weights(spec, checkpoint.weights)
    vocab_size = true_vocab_size(options, spec.vocab_size)
    return replace(spec, vocab_size=vocab_size, dtype=checkpoint.dtype)


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(CoreLoader())
