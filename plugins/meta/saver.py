"""Save a Llama as Meta's own model loads it, or a Mistral as Mistral's does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import click

from ckptx.containers import safetensors, torch_zip
from ckptx.errors import PlanError, SchemaError
from ckptx.model.layout import Layout
from ckptx.model.sharding import Rank, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.plugins.meta.loader import PARAMS
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Message
from ckptx.protocol.model import Model, check_messages, collect, resize_vocabulary
from ckptx.protocol.sidecars import CONFIG, dump_config
from ckptx.registry.families import family_named
from ckptx.schemas.conventions.meta import (
    EMBEDDING,
    META_WIDTH,
    OUTPUT,
    assumed_context,
    cut_by_width,
    params_from_spec,
)
from ckptx.storage.file_plan import FilePlan, literal_files
from ckptx.tensors.lazy import LazyTensor


class MetaSaver:
    """Writes ``consolidated.NN.pth`` and ``params.json``, with the model's small files."""

    name = "meta"
    capabilities: Mapping[str, Any] = {
        "formats": ["consolidated.NN.pth", "consolidated.safetensors"],
        "layouts": ["meta"],
        "tp": True,
        "lossless": True,
    }

    def options(self) -> list[click.Option]:
        """Return the options for the shards."""
        return [
            click.Option(
                ["target_shards", "--target-shards", "--target-tensor-parallel-size", "--tp"],
                type=click.IntRange(1),
                help="Shards, one per process that runs the model.  "
                "[default: a Meta source's, else 1]",
            ),
            click.Option(
                ["--embedding-split"],
                type=click.Choice(["vocabulary", "width"]),
                help="Axis along which shards cut the embedding.  [default: the source's, else "
                "width as Llama 1 and 2 have it up to 65,536 words, vocabulary as Llama 3 beyond]",
            ),
            click.Option(
                ["--consolidated"],
                type=click.Choice(["pth", "safetensors"]),
                help="Kind of weight file.  [default: safetensors for a Mistral in one shard, "
                "else pth]",
            ),
        ]

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return the plan of a directory."""
        model = collect(messages)
        spec = model.spec
        family = family_named(spec.family)
        shards = _shards(model, options)
        by_width = _by_width(model, options)
        layout = family.layout("meta-width" if by_width else "meta")
        check_messages(model, layout)
        dropped = resize_vocabulary(model, spec.vocab_size, fill=False)
        embedding = model.messages["embeddings"]["word embeddings"]
        spec = replace(spec, vocab_size=embedding.shape[0])
        params = params_from_spec(spec, by_width=by_width)
        _check_divides(spec, shards, by_width)
        ranks = [_named(model, layout, spec, shards, rank) for rank in range(shards)]
        dtype = main_dtype(ranks[0])
        beside = {**model.begin.sidecars, PARAMS: dump_config(params)}
        return SavePlan(
            [*literal_files(beside), *_weight_files(spec, ranks, options)],
            dropped=dropped,
            notes=tuple(_notes(model, spec, params)),
            load_hint=f"torchrun --nproc-per-node {shards} example_text_completion.py "
            "--ckpt_dir {target} --tokenizer_path {target}/tokenizer.model",
            details={
                "shards": shards,
                "embedding_split": "width" if by_width else "vocabulary",
                "tensors": len(ranks[0]),
                "dtype": dtype,
            },
        )


def _shards(model: Model, options: Mapping[str, Any]) -> int:
    begin = model.begin
    own = begin.parallel.get("tp") if begin.format == "meta" else None
    return int(options.get("target_shards") or own or 1)


def _by_width(model: Model, options: Mapping[str, Any]) -> bool:
    chosen = options.get("embedding_split")
    if chosen is not None:
        return bool(chosen == "width")
    if model.begin.format == "meta" and model.begin.parallel.get("tp", 1) > 1:
        return model.begin.layout == META_WIDTH.name
    return cut_by_width(model.spec)


def _check_divides(spec: ModelSpec, shards: int, by_width: bool) -> None:
    """Raise a PlanError unless Meta's model divides over so many shards."""
    sizes: dict[str, int | None] = {
        "attention heads": spec.num_attention_heads,
        "key heads": spec.num_query_groups,
        "rows of the feed-forward layer": spec.ffn_hidden_size,
        "words of the vocabulary": spec.vocab_size,
    }
    if by_width:
        sizes["columns of the embedding"] = spec.hidden_size
    for name, size in sizes.items():
        if size is not None and size % shards:
            raise PlanError(
                f"{size} {name} do not divide over {shards} shards, and Meta's model neither pads "
                "nor repeats; choose --target-shards that divides them"
            )


def _named(
    model: Model, layout: Layout, spec: ModelSpec, shards: int, rank: int
) -> dict[str, LazyTensor]:
    """Return what a shard holds; Meta's model has an output of its own even where it is tied."""
    named: dict[str, LazyTensor] = {}
    held = Rank(tp=shards, tp_rank=rank)
    for message, layer, rules in layout.expand(spec):
        named.update(shard_tensors(rules, model.messages[message], spec, layer, held))
    if spec.tied:
        embedding = model.messages["embeddings"]["word embeddings"]
        copy = embedding.chunk(0, shards, rank)
        # One object is stored once, under both names.
        named[OUTPUT] = named[EMBEDDING] if copy == named[EMBEDDING] else copy
    return named


def _weight_files(
    spec: ModelSpec, ranks: list[dict[str, LazyTensor]], options: Mapping[str, Any]
) -> Iterator[FilePlan]:
    usual = "safetensors" if spec.family == "mistral" and len(ranks) == 1 else "pth"
    if (options.get("consolidated") or usual) == "safetensors":
        if len(ranks) > 1:
            raise SchemaError(
                f"{len(ranks)} shards need --consolidated pth: Mistral's file is of one shard"
            )
        yield safetensors.plan_file("consolidated.safetensors", ranks[0])
        return
    for rank, named in enumerate(ranks):
        yield torch_zip.plan_file(f"consolidated.{rank:02d}.pth", named)


def _notes(model: Model, spec: ModelSpec, params: Mapping[str, Any]) -> Iterator[str]:
    if spec.tied:
        yield f"tied: {OUTPUT!r} is {EMBEDDING!r} again, as Meta publishes it"
    values = {name: getattr(spec, name) for name in ("rotary_base", "norm_epsilon", "vocab_size")}
    implied = assumed_context(spec.family, values, spec.rotary_scaling)
    if CONFIG not in model.begin.sidecars and spec.max_position_embeddings != implied:
        yield (
            f"{PARAMS} cannot say max_position_embeddings {spec.max_position_embeddings}: its "
            f"readers will assume {implied}"
        )
    if "rope_scaling_factor" in params:
        yield (
            f"rotary scaling by {params['rope_scaling_factor']:g}: Meta's code before Llama 4 has "
            "8 fixed in apply_scaling and ignores rope_scaling_factor; change it there"
        )


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(MetaSaver())
