"""Load a Megatron Core checkpoint, ``torch_dist`` or per rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.hookspecs import hookimpl
from ckptx.model_directory import base_sidecars, family_of, read_config, sidecars
from ckptx.parallel import Pipeline
from ckptx.plugin import Loader
from ckptx.plugins.megatron import directory, distributed, ranks
from ckptx.plugins.megatron.forms import LEGACY, Form
from ckptx.plugins.megatron.options import (
    CAPABILITIES,
    transformer_impl_option,
    true_vocab_size,
    vocabulary_options,
)
from ckptx.plugins.megatron.source import Source
from ckptx.protocol import Begin, End, Message, Tensors
from ckptx.schemas.args import inexpressible, spec_from_args
from ckptx.spec import ModelSpec
from ckptx.vocabulary import check_shapes


class CoreLoader:
    """Reads what Megatron Core writes, at any tensor and pipeline parallel size."""

    name = "core"
    layout = "mcore/gpt"
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
        spec = _spec(checkpoint, read_config(files, beside), options)
        messages = list(checkpoint.messages(spec))
        yield Begin(
            format=self.name,
            layout=self.layout,
            parts={"language": spec},
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
        for name, tensors in messages:
            check_shapes(name, tensors, spec)
            yield Tensors(name, tensors)
        yield End(tuple(checkpoint.dropped), tuple(self.notes(spec)))

    def read(self, place: directory.IterationDirectory) -> Source:
        """Read the metadata of a checkpoint."""
        if place.format == "torch_dist":
            return distributed.read(place)
        return ranks.read(place)

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return remarks on a model that was found."""
        return []


def found_form(source: Path) -> Form | None:
    """Return which kind of model a per-rank checkpoint holds, None where that cannot be told."""
    try:
        place = directory.find(source)
        return ranks.form_in(place) if place.format == "torch" else None
    except CkptxError:
        return None  # the loader will say what is wrong


def _spec(
    checkpoint: Source, config: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> ModelSpec:
    """Return the model's dimensions: args say what was trained, the config the rest."""
    family = family_of(config) if config else None
    if not checkpoint.args:
        if config is None or family is None:
            raise SchemaError(
                f"{checkpoint.place}: holds no args that describe the model; give --hf-base with a "
                "config of a known architecture"
            )
        spec = family.from_config(config)
    else:
        spec = spec_from_args(checkpoint.args, family.name if family else None)
        if config is not None and family is not None:
            # What args cannot say comes from the config; where both speak, args were trained with.
            named = family.from_config(config)
            spec = replace(
                spec,
                architecture=named.architecture,
                vocab_size=named.vocab_size,
                rotary_scaling=spec.rotary_scaling or named.rotary_scaling,
                extra={**named.extra, **spec.extra},
            )
            if problems := inexpressible(spec):
                raise SchemaError(
                    f"{checkpoint.place}: the config at hand is not of this model: "
                    f"{'; '.join(problems)}"
                )
    vocab_size = true_vocab_size(options, spec.vocab_size)
    return replace(spec, vocab_size=vocab_size, dtype=checkpoint.dtype)


@hookimpl
def register_loaders(register: Callable[[Loader], None]) -> None:
    """Register the loader."""
    register(CoreLoader())
