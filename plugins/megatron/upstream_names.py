"""Formats under the names, and with the options, that Megatron's converter gives them.

``hf``, ``meta`` and ``core`` read and write the weights; what is here is Megatron's command line.

Source: NVIDIA/Megatron-LM tools/checkpoint/loader_{llama_mistral,mixtral_hf,llava}.py @
core_v0.12.3; the names with a size that it lacks are those of core_v0.8.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import click

from ckptx.conversion.casting import cast_messages
from ckptx.conversion.options import option, switch
from ckptx.errors import FormatError, PlanError, SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron.core import CoreLoader, CoreSaver
from ckptx.plugins.megatron.options import (
    tokenizer_model_option,
    transformer_impl_option,
    true_vocab_size,
    vocabulary_multiple_option,
    vocabulary_options,
)
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, Messages
from ckptx.protocol.sidecars import CONFIG
from ckptx.registry import registry
from ckptx.storage.location import Location
from ckptx.tensors.dtypes import dtype_name

FAMILY = "mixtral"
PARAMS = "params.json"
"""Where Meta says the dimensions."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a model's name promises; None where it leaves it open.

    ``shards`` are those that Meta publishes it in, ``context`` its longest context where no file of
    Meta says it.
    """

    family: str
    layers: int | None = None
    heads: int | None = None
    groups: int | None = None
    shards: int | None = None
    context: int | None = None


SIZES: Mapping[str, Size] = {
    "llama2-7B": Size("llama", 32, 32, 32, 1, 4096),
    "llama2-13B": Size("llama", 40, 40, 40, 2, 4096),
    "llama2-70B": Size("llama", 80, 64, 8, 8, 4096),
    "llama3": Size("llama"),
    "llama3-8B": Size("llama", 32, 32, 8, 1),
    "llama3-70B": Size("llama", 80, 64, 8, 8),
    "mistral": Size("mistral"),
    "mistral-7B": Size("mistral", 32, 32, 8, 1),
    "yi-34B": Size("llama", 60, 56, 8),
    "qwen2.5": Size("qwen2"),
    "qwen2.5-7B": Size("qwen2", 28, 28, 4),
    "qwen2.5-72B": Size("qwen2", 80, 64, 8),
}
"""By Megatron's name; with an ``f`` behind the size it is the chat model."""

CHOICES = [name for base in SIZES for name in ((base, f"{base}f") if "B" in base else (base,))]


class LlamaMistralLoader:
    """Chooses a loader by ``--checkpoint-type`` and checks ``--model-size``."""

    name = "llama_mistral"

    def options(self) -> list[click.Option]:
        """Return Megatron's options."""
        files = "Read Meta's or Hugging Face's files."
        size = "What the model must be."
        return [
            option("--checkpoint-type", click.Choice(["meta", "hf"]), files, required=True),
            option("--model-size", click.Choice(CHOICES), size, required=True),
            switch("--bf16", "Cast weights to bfloat16."),
            switch("--fp16", "Cast weights to float16."),
            *vocabulary_options(),
            tokenizer_model_option(),
            vocabulary_multiple_option(),
            transformer_impl_option("loader"),
        ]

    def detect(self, source: Location) -> bool:
        """Return False: what it reads is detected as ``meta`` or ``hf``."""
        return False

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model, after checking that it is the one that was named."""
        name, kind = options.get("model_size"), options.get("checkpoint_type")
        if name not in CHOICES or kind not in ("meta", "hf"):
            raise PlanError("loader 'llama_mistral' needs --model-size and --checkpoint-type")
        dtype = _dtype(options, context)
        size = SIZES[name if name in SIZES else name.removesuffix("f")]
        if kind == "meta" and (size.family == "qwen2" or name.startswith("yi")):
            raise PlanError(f"--model-size {name} has no Meta files; use --checkpoint-type hf")
        place = source
        if kind == "meta" and not (source / PARAMS).is_file() and (source / name).is_dir():
            place = source / name  # as Megatron does: one folder per size
        loader = registry.loader(kind)
        messages = loader.load(place, {**options, "max_position": size.context}, context)
        begin = next(messages)
        if not isinstance(begin, Begin) or "language" not in begin.parts:
            next(messages, None)  # raises why the model does not fit, where that is the reason
            raise SchemaError(f"{source}: not a model of family {size.family}, as {name} is")
        _check(name, size, begin.parts["language"], begin)
        yield from cast_messages(chain([with_vocabulary(begin, options)], messages), dtype)


def with_vocabulary(begin: Begin, options: Options) -> Begin:
    """Return the first message with what Megatron's options say of vocabulary and tokenizer."""
    spec = begin.parts["language"]
    rows = true_vocab_size(options, spec.vocab_size)
    return replace(
        begin,
        parts={"language": replace(spec, vocab_size=rows)},
        sidecars={**_tokenizer(options), **begin.sidecars},
    )


def _dtype(options: Options, context: Context) -> str | None:
    chosen = [flag for flag in ("bf16", "fp16") if options.get(flag)]
    if len(chosen) > 1:
        raise PlanError("--bf16 and --fp16 exclude each other")
    dtype = dtype_name(chosen[0]) if chosen else None
    other = context.dtype
    if dtype is not None and other not in (None, dtype):
        raise PlanError(f"--{chosen[0]} and --dtype {other} contradict each other")
    return dtype


def _check(name: str, size: Size, spec: ModelSpec, begin: Begin) -> None:
    """Raise a SchemaError unless the model is what its name promises."""
    shards = begin.parallel.get("tp") if begin.format == "meta" else None
    where = CONFIG if begin.format == "hf" else PARAMS
    found: dict[str, tuple[object, object]] = {
        "of family": (size.family, spec.family),
        "layers": (size.layers, spec.num_layers),
        "attention heads": (size.heads, spec.num_attention_heads),
        "key heads": (size.groups, spec.num_query_groups),
        "shards": (size.shards if shards else None, shards),
    }
    wrong = [
        f"{what} {is_} (not {expected})"
        for what, (expected, is_) in found.items()
        if expected not in (None, is_)
    ]
    if wrong:
        raise SchemaError(
            f"--model-size {name} is not this model: {where} and the weights say {', '.join(wrong)}"
        )


def _tokenizer(options: Options) -> dict[str, bytes]:
    """Return the file of ``--tokenizer-model``, which may also be a name or a directory."""
    given = options.get("tokenizer_model")
    if given is None or not Path(given).is_file():
        return {}
    try:
        return {Path(given).name: Path(given).read_bytes()}
    except OSError as error:
        raise FormatError(f"--tokenizer-model {given}: cannot be read: {error.strerror}") from error


class MixtralHfLoader:
    """Reads what the loader ``hf`` reads, and nothing but Mixtral."""

    name = "mixtral_hf"

    def options(self) -> list[click.Option]:
        """Return Megatron's options."""
        return [*vocabulary_options(), tokenizer_model_option()]

    def detect(self, source: Location) -> bool:
        """Return False: what it reads is detected as ``hf``."""
        return False

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model, after checking that it is a Mixtral."""
        messages = registry.loader("hf").load(source, options, context)
        begin = next(messages)
        spec = begin.parts.get("language") if isinstance(begin, Begin) else None
        if not isinstance(begin, Begin) or spec is None or spec.family != FAMILY:
            next(messages, None)  # raises why the model does not fit, where that is the reason
            found = spec.architecture if spec else "of an unknown architecture"
            raise SchemaError(f"{source}: the model is {found}, not a Mixtral; use --loader hf")
        yield with_vocabulary(begin, options)
        yield from messages


class LlavaLoader(CoreLoader):
    """Reads what loader ``core`` reads, and nothing without a vision tower."""

    name = "llava"

    def options(self) -> list[click.Option]:
        """Return the options of loader ``core`` and Megatron's own."""
        about = "Heads of InternViT that count for nothing; found without it, and checked."
        heads = option("--vit-dummy-head-count", click.IntRange(0), about, 0, show_default=False)
        return [*super().options(), heads]

    def detect(self, source: Location) -> bool:
        """Return False: what it reads is detected as ``core``."""
        return False

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model."""
        messages = super().load(source, options, context)
        for message in messages:
            if isinstance(message, Begin) and "vision" not in message.parts:
                next(messages, None)  # raises why the model does not fit, where that is the reason
                raise FormatError(
                    f"{message.root}: holds no vision_model, so it is no LLaVA; use --loader core"
                )
            yield message


class LlavaSaver(CoreSaver):
    """Writes what saver ``core`` writes, and nothing without a vision tower."""

    name = "llava"

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of one iteration directory below the target root."""
        first = next(messages, None)
        if isinstance(first, Begin) and "vision" not in first.parts:
            raise SchemaError("the source has no vision tower, so it is no LLaVA; use --saver core")
        whole = messages if first is None else chain([first], messages)
        return super().plan(whole, options, context)
