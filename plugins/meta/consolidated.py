"""A Llama as Meta publishes it, or a Mistral as Mistral does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from ckptx.containers import safetensors, torch_zip
from ckptx.conversion.options import option
from ckptx.errors import FormatError, PlanError, SchemaError, listing
from ckptx.hf_models.directory import base_sidecars, sidecars
from ckptx.hf_models.weights import INDEXES, SINGLES, Weights
from ckptx.model.canonical_names import check_shapes
from ckptx.model.layout import Layout
from ckptx.model.sharding import Gatherer, Rank, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import inventory, main_dtype
from ckptx.protocol.messages import Begin, Dropped, End, Messages, SourceTensor, Tensors
from ckptx.protocol.model import Model, check_messages, collect, resize_vocabulary
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import family_named, family_of
from ckptx.schemas.conventions.meta import (
    EMBEDDING,
    META_WIDTH,
    OUTPUT,
    assumed_context,
    cut_by_width,
    params_from_spec,
    spec_from_params,
)
from ckptx.storage.blocks import equal
from ckptx.storage.file_plan import FilePlan, literal_files
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_json
from ckptx.tensors.lazy import LazyTensor, Stored

PARAMS = "params.json"
_PTH = "consolidated.*.pth"
_SAFETENSORS = "consolidated*.safetensors"
_QUERY = "layers.0.attention.wq.weight"
_GATE = "layers.0.feed_forward.w1.weight"

Shard = dict[str, LazyTensor]


class MetaLoader:
    """Reads ``consolidated.NN.pth``, any number of them, or ``consolidated.safetensors``."""

    name = "meta"

    def options(self) -> list[click.Option]:
        """Return no options: everything is read from the directory."""
        return []

    def detect(self, source: Location) -> bool:
        """Return whether there are consolidated weights, and none of Hugging Face's beside them."""
        if not (source / PARAMS).is_file():
            return False
        if any((source / name).exists() for name in (*INDEXES, *SINGLES)):
            return False
        return any(next(source.glob(pattern), None) for pattern in (_PTH, _SAFETENSORS))

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; ``max_position`` among the options is its longest context, if known."""
        if context.fill_from_base:
            raise FormatError(
                "--fill-from-base fills tensors by their Hugging Face names, which a Meta source "
                "has not; convert it to hf first, then fill"
            )
        params = read_params(source)
        weights, shards = read_shards(source)
        beside = {**sidecars(source), **base_sidecars(context)}
        beside.pop(PARAMS, None)
        said = params.get("model", params)
        _check_count(said, shards, source)
        by_width = len(shards) > 1 and _length(shards, EMBEDDING, 1) == said.get("dim")
        rows = _length(shards[:1] if by_width else shards, EMBEDDING, 0)
        try:
            spec = spec_from_params(said, rows=rows, ffn=_length(shards, _GATE, 0))
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from error
        spec = replace(spec, dtype=main_dtype(shards[0]), tied=OUTPUT not in shards[0])
        spec, notes = _completed(spec, said, read_config(beside, source), options)
        layout = family_named(spec.family).layout("meta-width" if by_width else "meta")
        labels = [f"{path.name}: " if len(shards) > 1 else "" for path in weights.paths]
        sources = [
            entry
            for label, shard in zip(labels, shards, strict=False)
            for entry in inventory(shard, label)
        ]
        for shard in shards:
            for name in [name for name in shard if name.endswith(layout.ignored)]:
                del shard[name]
        dropped = _dropped(sources, layout.ignored, "no weights: the model makes it anew")
        found = _take(layout, spec, shards, labels)
        files = tuple(map(str, weights.paths))
        # Meta stores both, and says nowhere whether they are one.
        if not spec.tied and equal(_embedding(found), found["output layer"]["weight"], files):
            spec, _ = replace(spec, tied=True), found.pop("output layer")
            dropped += _dropped(sources, (OUTPUT,), f"tied: equal to {EMBEDDING!r}, byte for byte")
            notes += (f"{OUTPUT!r} equals {EMBEDDING!r}: the model's embeddings are tied",)
        yield Begin(
            format="meta",
            layout=layout.name,
            parts={"language": spec},
            files=files,
            sources=tuple(sources),
            root=str(source),
            sidecars=beside,
            parallel={"tp": len(shards)},
        )
        for name, tensors in found.items():
            check_shapes(name, tensors, spec)
            yield Tensors(name, tensors)
        yield End(tuple(dropped), notes)


def read_params(source: Location) -> dict[str, Any]:
    """Return the content of ``params.json``.

    Raises:
        FormatError: it is missing, or no JSON object.
    """
    path = source / PARAMS
    if not path.is_file():
        raise FormatError(f"{source}: holds no {PARAMS}, which says what the weights are")
    params = read_json(path)
    if not isinstance(params.get("model", {}), dict):
        raise FormatError(f"{path}: expected a JSON object")
    return params


def read_shards(source: Location) -> tuple[Weights, list[Shard]]:
    """Return the files of a model and the tensors of every shard.

    Safetensors files divide a model by tensors, not tensors by ranks: together they are one shard.

    Raises:
        FormatError: there are none, one is missing or damaged, or there are both kinds.
    """
    pickled, plain = sorted(source.glob(_PTH), key=_number), sorted(source.glob(_SAFETENSORS))
    if bool(pickled) == bool(plain):
        found = f"both {pickled[0].name} and {plain[0].name}" if pickled else "neither kind"
        raise FormatError(
            f"{source}: expected either {_PTH} or {_SAFETENSORS} files, found {found}"
        )
    weights = Weights([], {}, {})
    if plain:
        said = {int(m[1]) for p in plain if (m := re.search(r"-of-(\d+)\.safetensors$", p.name))}
        if said and said != {len(plain)}:
            raise FormatError(
                f"{source}: {plain[0].name} says that there are {max(said)} files, found "
                f"{len(plain)}; copy the others"
            )
        for path in plain:
            weights.add(path)
        return weights, [dict(weights.tensors)]
    numbers = [_number(path) for path in pickled]
    absent = [f"consolidated.{n:02d}.pth" for n in range(max(numbers)) if n not in numbers]
    if absent:
        raise FormatError(
            f"{source}: {len(absent)} of {max(numbers) + 1} shards are missing: {listing(absent)}; "
            "copy them"
        )
    if len(set(numbers)) < len(numbers) or numbers[0] < 0:
        raise FormatError(
            f"{source}: {listing(path.name for path in pickled)} are not numbered one by one"
        )
    weights.paths += pickled
    return weights, [_read_shard(path, number) for number, path in enumerate(pickled)]


def _number(path: Location) -> int:
    middle = path.name.removeprefix("consolidated.").removesuffix(".pth")
    return int(middle) if middle.isdecimal() else -1


def _read_shard(path: Location, file: int) -> Shard:
    value = torch_zip.read(path, file)
    if not isinstance(value, dict) or not all(isinstance(v, Stored) for v in value.values()):
        raise FormatError(f"{path}: expected a plain state dict of tensors")
    return {str(name): tensor for name, tensor in value.items()}


def _completed(
    spec: ModelSpec, said: Mapping[str, Any], config: Mapping[str, Any] | None, options: Options
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Return the spec with what only a config says, and remarks on what nothing says."""
    family = family_of(config) if config else None
    if config is not None and family is not None and family.name == spec.family:
        named = family.from_config(config)
        scaling = named.rotary_scaling if spec.rotary_scaling else None
        return replace(
            spec,
            architecture=named.architecture,
            max_position_embeddings=named.max_position_embeddings,
            rotary_scaling=scaling or spec.rotary_scaling,
            extra={**named.extra, **spec.extra},
        ), ()
    if options.get("max_position"):
        return replace(spec, max_position_embeddings=options["max_position"]), ()
    if said.get("max_seq_len"):
        return spec, ()
    note = (
        f"{PARAMS} does not say the longest context: {spec.max_position_embeddings} is assumed, as "
        "of the release with such numbers; --hf-base gives the config"
    )
    return spec, (note,)


def _check_count(said: Mapping[str, Any], shards: Sequence[Shard], source: Location) -> None:
    """Raise unless there are as many shards as the shapes need."""
    heads, dim = said.get("n_heads"), said.get("dim")
    if type(heads) is not int or type(dim) is not int or heads < 1:
        return  # the table of params.json says it better
    whole = (said.get("head_dim") or dim // heads) * heads
    rows = _length(shards[:1], _QUERY, 0)
    needed, rest = divmod(whole, max(1, rows))
    if rest or not needed:
        raise SchemaError(
            f"{source}: {PARAMS} contradicts the shards: {_QUERY} has {rows} rows in a shard, "
            f"{heads} heads have {whole}"
        )
    if needed != len(shards):
        first = f"consolidated.{len(shards):02d}.pth"
        missing = f"; copy {first} and those after it" if needed > len(shards) else ""
        raise FormatError(
            f"{source}: found {len(shards)} shards, expected {needed}: {_QUERY} has {rows} of "
            f"{whole} rows in a shard{missing}"
        )


def _length(shards: Sequence[Shard], name: str, axis: int) -> int:
    """Return the length of a weight along ``axis``, all shards together."""
    for shard in shards:
        if name not in shard or len(shard[name].shape) != 2:
            raise SchemaError(f"a shard holds no weight {name!r}; it is no shard of a Llama")
    return sum(shard[name].shape[axis] for shard in shards)


def _dropped(sources: Sequence[SourceTensor], names: tuple[str, ...], reason: str) -> list[Dropped]:
    return [
        Dropped(entry.name, reason, entry.extent.nbytes, (entry.extent,))
        for entry in sources
        if entry.name.rpartition(" ")[2].endswith(names)
    ]


def _take(
    layout: Layout, spec: ModelSpec, shards: Sequence[Shard], labels: Sequence[str]
) -> dict[str, dict[str, LazyTensor]]:
    taker = Gatherer(layout, spec)
    found = {}
    for message, layer, rules in layout.expand(spec):
        if canonical := taker.take(rules, shards, layer):
            found[message] = canonical
    taker.finish(
        [label + name for label, shard in zip(labels, shards, strict=False) for name in shard]
    )
    return found


def _embedding(messages: Mapping[str, Mapping[str, LazyTensor]]) -> LazyTensor:
    return messages["embeddings"]["word embeddings"]


class MetaSaver:
    """Writes ``consolidated.NN.pth`` and ``params.json``, with the model's small files."""

    name = "meta"

    def options(self) -> list[click.Option]:
        """Return the options for the shards."""
        names = "target_shards --target-shards --target-tensor-parallel-size --tp"
        shards = "Shards, one per process that runs the model.  [default: a Meta source's, else 1]"
        axis = (
            "Axis along which shards cut the embedding.  [default: the source's, else width as "
            "Llama 1 and 2 have it up to 65,536 words, vocabulary as Llama 3 beyond]"
        )
        kind = "Kind of weight file.  [default: safetensors for a Mistral in one shard, else pth]"
        return [
            option(names, click.IntRange(1), shards),
            option("--embedding-split", click.Choice(["vocabulary", "width"]), axis),
            option("--consolidated", click.Choice(["pth", "safetensors"]), kind),
        ]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of a directory."""
        model = collect(messages)
        spec = model.spec
        family = family_named(spec.family)
        own = model.begin.parallel.get("tp") if model.begin.format == "meta" else None
        shards = int(options.get("target_shards") or own or 1)
        by_width = _by_width(model, options)
        layout = family.layout("meta-width" if by_width else "meta")
        check_messages(model, layout)
        dropped = resize_vocabulary(model, spec.vocab_size, fill=False)
        spec = replace(spec, vocab_size=_embedding(model.messages).shape[0])
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


def _by_width(model: Model, options: Options) -> bool:
    if (chosen := options.get("embedding_split")) is not None:
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
        copy = _embedding(model.messages).chunk(0, shards, rank)
        # One object is stored once, under both names.
        named[OUTPUT] = named[EMBEDDING] if copy == named[EMBEDDING] else copy
    return named


def _weight_files(
    spec: ModelSpec, ranks: list[dict[str, LazyTensor]], options: Options
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
