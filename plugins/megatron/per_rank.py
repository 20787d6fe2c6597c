"""The per-rank form: ``mp_rank_TT[_PPP]/model_optim_rng.pt``, one file per model-parallel rank.

Layers are numbered from 0 in every pipeline chunk; with virtual stages a file holds ``model0``,
``model1``, ... instead of ``model``. Gated weights hold each rank's gate and up rows together.
Models of Megatron Core and legacy ones differ in what ``model`` is: a `Form`.

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py @ core_v0.16.1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptx.containers import torch_zip
from ckptx.containers.pickle_values import Namespace, Record
from ckptx.containers.torch_zip import stored_bytes
from ckptx.errors import FormatError, PlanError, SchemaError, listing
from ckptx.model.canonical_names import layer_of
from ckptx.model.layout import Layout, Parts, rule
from ckptx.model.pipeline_parallel import Chunk, Pipeline
from ckptx.model.sharding import Gatherer, Rank, Shards, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron import rank_checks, rank_names
from ckptx.plugins.megatron.directory import RANK_FILES, IterationDirectory
from ckptx.plugins.megatron.forms import CORE, Generation, form_of
from ckptx.plugins.megatron.rank_checks import RankFile
from ckptx.plugins.megatron.source import (
    BUFFERS,
    ENGINE_STATE,
    MADE_ANEW,
    Excluded,
    Source,
    exclude_nothing,
)
from ckptx.plugins.megatron.torch_dist import Target, applies, holds
from ckptx.protocol.from_names import main_dtype
from ckptx.protocol.messages import TRAINING_STATE, Dropped, SourceTensor, Tensors
from ckptx.protocol.model import Model
from ckptx.registry.detection import remembered
from ckptx.schemas.megatron_settings.args import args_of
from ckptx.storage.file_plan import FilePlan
from ckptx.storage.location import Location
from ckptx.tensors.lazy import Filled, LazyTensor, Stored, replicated

_QUANTISED = ("Float8", "MXFP8", "NVFP4")
"""How the classes of quantised weights begin: Float8Tensor, Float8BlockwiseQTensor, MXFP8Tensor.

Source: NVIDIA/TransformerEngine transformer_engine/pytorch/tensor/*.py @ v2.9."""
_LAYER = re.compile(r"(?:language_model\.)?(?:decoder|encoder|transformer)\.layers\.(\d+)\.")


def first_rank(checkpoint: IterationDirectory) -> tuple[Generation, dict[str, Any]]:
    """Return which kind of model the first rank's file holds, and its args.

    Raises:
        FormatError: the file is damaged or holds no model.
    """
    path = rank_names.rank_file(
        rank_names.rank_directories(checkpoint.path)[0], rank_names.MEGATRON_FILES
    )
    state = _state_of(path, 0)
    args = args_of(state, path)
    return form_of(next(rank_names.models_in(state, path))[1]), args


def read(
    checkpoint: IterationDirectory,
    form: Generation = CORE,
    completed: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
    kind: rank_names.Files = rank_names.MEGATRON_FILES,
    apart: Excluded = exclude_nothing,
) -> Source:
    """Read the pickles of every rank; ``completed`` returns their args as they are to be taken.

    Raises:
        FormatError: a rank is missing, superfluous, damaged or of another run.
    """
    directory = checkpoint.path
    found = rank_names.rank_directories(directory, kind)
    first = _read_rank(rank_names.rank_file(found[0], kind), 0, form, kind)
    args = dict(completed(first.args))
    tp, pp, ep, etp = rank_names.parallel_sizes(args, found, kind)
    ranks = rank_names.stored_ranks(tp, ep, etp)
    names = [
        rank_names.directory_name(rank, pp_rank, pp) + kind.ending
        for pp_rank in range(pp)
        for rank in ranks
    ]
    rank_checks.check_directories(directory, names, [path.name for path in found])
    paths = [rank_names.rank_file(directory / name, kind) for name in names]
    grid = [
        _read_rank(path, number, form, kind) if number or path != first.path else first
        for number, path in enumerate(paths)
    ]
    for rank in grid:
        rank_checks.check_same_run(first, rank)
    args |= _placement(args, grid, len(ranks))
    notes = rank_checks.check_copies(grid, ranks)
    rank_checks.check_order(grid, ranks)
    weights = {
        f"{rank.label}:{index}:{name}": tensor
        for rank in grid
        for index, model in enumerate(rank.models)
        for name, tensor in model.items()
    }
    others = _taken_out(grid, apart)

    def messages(layout: Layout, parts: Parts) -> Iterator[Tensors]:
        pipeline = _pipeline(args, grid, len(ranks), parts["language"])
        return _messages(grid, ranks, pipeline, layout, parts, form)

    return Source(
        directory,
        args,
        tuple(map(str, paths)),
        tuple(SourceTensor(name, tensor) for name, tensor in weights.items()),
        list(_dropped(grid)),
        main_dtype(weights) if weights else "bfloat16",
        messages,
        grid[0].models[0],
        tp,
        first.version,
        others,
        notes,
    )


def _taken_out(grid: list[RankFile], apart: Excluded) -> dict[str, list[LazyTensor]]:
    """Take out of the ranks' models what is no part of the layout, and return it by name."""
    others: dict[str, list[LazyTensor]] = {}
    for model in (model for rank in grid for model in rank.models):
        for name in [name for name, tensor in model.items() if apart(name, tensor)]:
            others.setdefault(name, []).append(model.pop(name))
    return others


def plan(model: Model, target: Target, pp: int, form: Generation = CORE) -> Iterator[FilePlan]:
    """Yield one file per rank."""
    yield from torch_zip.plan_files(_states_of_ranks(model, target, pp, form))


def _states_of_ranks(
    model: Model, target: Target, pp: int, form: Generation
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and content of every rank's file."""
    virtual = any(chunk.vpp_rank for chunk in target.chunks)
    args = Namespace(**target.args)
    for pp_rank in range(pp):
        chunks = [chunk for chunk in target.chunks if chunk.pp_rank == pp_rank]
        shares: list[dict[Any, Any]] = [{} for _ in chunks]
        for rank in target.ranks:
            state: dict[str, Any] = {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": target.iteration,
            }
            for chunk, shared in zip(chunks, shares, strict=True):
                key = f"model{chunk.vpp_rank}" if virtual else "model"
                state[key] = form.stored(_state_dict(model, target, chunk, rank, form, shared))
            yield f"{rank_names.directory_name(rank, pp_rank, pp)}/{RANK_FILES[0]}", state


def _state_dict(
    model: Model, target: Target, chunk: Chunk, rank: Rank, form: Generation, shares: dict[Any, Any]
) -> dict[str, Any]:
    """Return what one rank's ``model`` holds for one pipeline chunk, by name."""
    named: dict[str, Any] = {}
    for held in target.layout.held(model.parts):
        message, layer = held.message, held.layer
        if not _stores(chunk, message, layer):
            continue
        local = _local(chunk, message, layer)
        named.update(
            shard_tensors(held.rules, model.messages[message], held.spec, local, rank, shares)
        )
        if message != "output layer":
            named.update(_states(held.spec, target, message, layer, local, rank))
    if chunk.output and model.spec.tied and not chunk.embedding:
        embedding = model.messages["embeddings"]["word embeddings"]
        named[form.tied_copy(target.layout)] = embedding.chunk(0, rank.tp, rank.tp_rank)
    if chunk.output:
        # The module is there even where its weight is not.
        named.update(_states(model.spec, target, "output layer", None, None, rank))
    return named


def _stores(chunk: Chunk, message: str, layer: int | None) -> bool:
    """Return whether a chunk's file has a message; multi-token prediction embeds for itself."""
    return holds(chunk, message, layer) or (message == "embeddings" and chunk.mtp)


def _local(chunk: Chunk, message: str, layer: int | None) -> int | None:
    """Return the number that a layer has in the file of its chunk."""
    return layer if layer_of(message) is None else chunk.layers.index(layer or 0)


def _states(
    spec: ModelSpec, target: Target, message: str, layer: int | None, local: int | None, rank: Rank
) -> Iterator[tuple[str, Any]]:
    for state in target.states:
        if applies(state, spec, message, layer):
            value = Filled("uint8", (0,)) if state.engine else None
            experts = (spec.num_experts or 0) // rank.ep if "{expert}" in state.module else 1
            for expert in range(experts):
                yield f"{state.module.format(layer=local, expert=expert)}._extra_state", value


def _messages(
    grid: list[RankFile],
    ranks: list[Rank],
    pipeline: Pipeline,
    layout: Layout,
    parts: Parts,
    form: Generation,
) -> Iterator[Tensors]:
    spec = parts["language"]
    chunks = pipeline.chunks(spec.num_layers, spec.mtp_num_layers)
    virtual = max(chunk.vpp_rank for chunk in chunks) + 1
    for rank in grid:
        if len(rank.models) != virtual:
            raise FormatError(
                f"{rank.path}: holds {len(rank.models)} virtual stages, the args say {virtual}"
            )
    width = len(ranks)
    left = {
        (chunk.pp_rank, chunk.vpp_rank): [
            dict(rank.models[chunk.vpp_rank])
            for rank in grid[chunk.pp_rank * width : (chunk.pp_rank + 1) * width]
        ]
        for chunk in chunks
    }
    stages = {}
    for (pp_rank, vpp_rank), shards in left.items():
        labels = [f"{rank.label}: " for rank in grid[pp_rank * width :][:width]]
        stages[pp_rank, vpp_rank] = Shards.of_grid(shards, ranks, labels)
    taker = Gatherer(layout, spec)
    found = {}
    part_of = {}
    for held in layout.held(parts):
        message, layer = held.message, held.layer
        part_of[message] = held.part
        own = taker.of(held.spec)
        copies = []
        for chunk in (c for c in chunks if _stores(c, message, layer)):
            stage = stages[chunk.pp_rank, chunk.vpp_rank]
            label = f"{grid[chunk.pp_rank * width].label}: "
            copies.append(own.take(held.rules, stage, _local(chunk, message, layer), label))
        keys = set.intersection(*map(set, copies))
        found[message] = {k: replicated([c[k] for c in copies]) for k in copies[0] if k in keys}
    if spec.tied:
        last = next(chunk for chunk in chunks if chunk.output)
        copy = form.tied_copy(layout)
        _join_tied(found, stages[last.pp_rank, last.vpp_rank], taker, copy)
    taker.finish(
        [
            f"{grid[pp_rank * width + number].label}: {name}"
            for (pp_rank, _), shards in left.items()
            for number, shard in enumerate(shards)
            for name in shard
        ]
    )
    return (
        Tensors(message, tensors, part_of[message]) for message, tensors in found.items() if tensors
    )


def _join_tied(
    found: dict[str, dict[str, LazyTensor]], shards: Shards, taker: Gatherer, name: str
) -> None:
    """Make the copy of tied embeddings that the last stage holds a replica of the first's."""
    embeddings = found["embeddings"]
    held = any(name in shard for copies in shards.dense for shard in copies)
    if "word embeddings" not in embeddings or not held:
        return
    if copy := taker.take([rule("weight", name, tp=0)], shards, None, "tied copy: "):
        pair = [embeddings["word embeddings"], copy["weight"]]
        embeddings["word embeddings"] = replicated(pair)


def _read_rank(path: Location, number: int, form: Generation, kind: rank_names.Files) -> RankFile:
    state = kind.state(_state_of(path, number), path)
    args = args_of(state, path)
    models: list[dict[str, LazyTensor]] = []
    states = 0
    rest: dict[str, int] = {}
    held = dict(rank_names.models_in(state, path))
    for key, entries in held.items():
        other = form_of(entries)
        if other is not form:
            advice = f"use --loader {other.name} (--from {other.name})"
            if number:
                advice = "the rank files are of different runs"
            raise FormatError(
                f"{path}: {key!r} is of {other.meaning}, not of {form.meaning}; {advice}"
            )
        try:
            named = form.named(entries)
        except SchemaError as error:
            raise FormatError(f"{path}: {key!r}: {error}") from error
        weights = {n: v for n, v in named.items() if not n.endswith("_extra_state")}
        unknown = [name for name, value in weights.items() if not isinstance(value, Stored)]
        if unknown:
            raise FormatError(
                f"{path}: {listing(unknown)} of {key!r} are {_kind_of(weights[unknown[0]])}"
            )
        buffers = {name: weights.pop(name).nbytes for name in [*weights] if name.endswith(BUFFERS)}
        rest |= {name: rest.get(name, 0) + size for name, size in buffers.items()}
        models.append(weights)
        states += stored_bytes(
            [v for n, v in named.items() if n not in weights and n not in buffers]
        )
    known = {*held, "args", "checkpoint_version", "iteration"}
    rest |= {key: stored_bytes(value) for key, value in state.items() if key not in known}
    version = state.get("checkpoint_version", 0)
    return RankFile(path, args, state.get("iteration"), version, models, states, rest)


def _kind_of(value: Any) -> str:
    """Return what lies in the place of a weight, and what to do about it."""
    kind = type(value).name.partition(".")[0] if isinstance(value, Record) else ""
    if not kind.startswith(_QUANTISED):
        return "no tensors"
    return (
        f"{kind} of Transformer Engine, quantised values with scales; save the checkpoint again "
        "with --ckpt-format torch_dist, where Megatron writes such weights in bfloat16"
    )


def _state_of(path: Location, number: int) -> Any:
    """Return what the file of a rank holds; the first is read once, to be recognised and loaded."""
    if number:
        return torch_zip.read(path, number)
    return remembered(("rank", path), lambda: torch_zip.read(path, 0))


def _pipeline(
    args: Mapping[str, Any], grid: list[RankFile], width: int, spec: ModelSpec
) -> Pipeline:
    """Return what args say of the pipeline; the files themselves where there are none."""
    if args:
        return Pipeline.from_args({**args, "num_layers": spec.num_layers})
    counts = _layers_held(grid, width)
    if sum(counts) != spec.num_layers:
        raise FormatError(
            f"{grid[0].path.parent.parent}: the ranks hold {sum(counts)} layers, the config says "
            f"{spec.num_layers}; it is not of this model, or ranks are missing"
        )
    return Pipeline(len(grid) // width, layout=_laid_out(counts, spec.mtp_num_layers))


def _placement(args: Mapping[str, Any], grid: list[RankFile], width: int) -> dict[str, Any]:
    """Return the pipeline layout that the files have, as an arg, where args do not say it.

    Raises:
        FormatError: args place the layers otherwise than the files.
    """
    layers = args.get("num_layers")
    counts = _layers_held(grid, width)
    if not isinstance(layers, int) or sum(counts) != layers:
        return {}  # what is missing is said by name
    pipeline = Pipeline.from_args(args)
    further = args.get("mtp_num_layers") or 0
    try:
        said = [len(chunk.layers) for chunk in pipeline.chunks(layers, further)]
    except PlanError:
        said = []
    if said == counts:
        return {}
    if pipeline != Pipeline(pipeline.pp, pipeline.vpp):
        raise FormatError(
            f"{grid[0].path.parent.parent}: by args ({pipeline}) the stages hold "
            f"{said or 'no whole number of'} layers, in the rank files {counts}; they are not of "
            "one checkpoint"
        )
    return {"pipeline_model_parallel_layout": _laid_out(counts, further)}


def _layers_held(grid: list[RankFile], width: int) -> list[int]:
    """Return the number of layers in every pipeline chunk, in the order of execution."""
    return [
        len({match[1] for match in map(_LAYER.match, rank.models[virtual]) if match})
        for virtual in range(len(grid[0].models))
        for rank in grid[::width]
        if virtual < len(rank.models)
    ]


def _laid_out(counts: list[int], further: int) -> str:
    """Return a pipeline layout; multi-token prediction is where the output is."""
    return "E" + "|".join("t" * count for count in counts) + "m" * further + "L"


def _dropped(grid: list[RankFile]) -> Iterator[Dropped]:
    if states := sum(rank.states for rank in grid):
        yield Dropped("_extra_state tensors", ENGINE_STATE, states)
    totals: Counter[str] = Counter()
    for rank in grid:
        totals.update(rank.other)
    paths = {rank.path for rank in grid}
    for place in {path.parent for path in paths}:
        for file in place.iterdir():
            if file not in paths and file.is_file():
                totals[file.name] += file.stat().st_size
    for key, size in totals.items():
        yield Dropped(key, MADE_ANEW if key.endswith(BUFFERS) else TRAINING_STATE, size)
