"""The weights of a whole checkpoint, however its model is split over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckptx.errors import FormatError, listing
from ckptx.plugins.deepspeed import experts, pipeline
from ckptx.plugins.deepspeed.directory import Checkpoint, Saved
from ckptx.plugins.deepspeed.tensor_parallel import Join
from ckptx.plugins.deepspeed.weights import Weights, of_masters, of_module
from ckptx.protocol.messages import Dropped
from ckptx.tensors.lazy import LazyTensor, Shape, replicated


def gathered(
    saved: Saved,
    masters: bool,
    widen: bool,
    shapes: Mapping[str, Shape],
    layer_map: str | None = None,
    frozen: bool = True,
) -> Weights:
    """Return the weights of all ranks: fp32 masters, or those of the module.

    Without ``frozen`` only those that were trained. ``shapes`` are those of the model by name, as
    far as a base model or its config says them.

    Raises:
        FormatError: ranks do not fit together, or it is not known how they do.
    """

    def read(part: Checkpoint) -> Weights:
        if not masters:
            return of_module(part)
        weights = of_masters(part, widen and frozen)
        if not frozen:
            weights.leave_frozen()
        return weights

    if saved.layers:
        parts: Iterable[Checkpoint]
        parts = pipeline.stages(saved) if masters else [_layers(saved)]
        weights = _united(list(map(read, parts)))
        weights.tensors, note = pipeline.renamed(weights.tensors, saved, layer_map, shapes)
        weights.notes.append(note)
        return weights
    if layer_map is not None:
        raise FormatError(f"{saved.directory}: --layer-map is for a PipelineModule, this is none")
    if saved.experts:
        named = masters and saved.ranks[0].stage
        parts = experts.shares(saved) if named else [experts.with_module(saved)]
        return _united(list(map(read, parts)))
    found = list(map(read, saved.ranks))
    if len(found) == 1:
        return found[0]
    names = [list(weights.tensors) for weights in found]
    for rank, own in enumerate(names):
        if odd := set(own) ^ set(names[0]):
            raise FormatError(
                f"{saved.directory}: mp_rank_00 and mp_rank_{rank:02d} have not the same tensors: "
                f"{listing(sorted(odd))}; the files are not of one checkpoint"
            )
    join = Join(saved.ranks[0].model, saved.directory, shapes)
    shards = {name: [weights.tensors[name] for weights in found] for name in names[0]}
    whole = _accounts(found)
    whole.tensors = {name: join.whole(name, shards[name]) for name in names[0]}
    return whole


def _layers(saved: Saved) -> Checkpoint:
    """Return the module of a pipeline as a checkpoint of one rank."""
    (first, *_) = saved.ranks
    model = {**first.model, "module": pipeline.numbered(saved)}
    model |= {"frozen_param_shapes": {}, "frozen_param_fragments": {}}
    return Checkpoint(saved.directory, first.stage, [model], files=saved.files)


def _united(parts: Sequence[Weights]) -> Weights:
    """Return what several ranks have, each a part of the model; what several have is compared."""
    copies: dict[str, list[LazyTensor]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            copies.setdefault(name, []).append(tensor)
    whole = _accounts(parts)
    whole.tensors = {name: replicated(found) for name, found in copies.items()}
    return whole


def _accounts(parts: Sequence[Weights]) -> Weights:
    """Return what became of everything that the ranks hold, without their tensors."""
    whole = Weights()
    dropped: dict[tuple[str, str], list[Dropped]] = {}
    for part in parts:
        for one in part.dropped:
            dropped.setdefault((one.name, one.reason), []).append(one)
        whole.sources += part.sources
        whole.frozen |= part.frozen
        whole.notes += [note for note in part.notes if note not in whole.notes]
    for (name, reason), found in dropped.items():
        tensors = tuple(dict.fromkeys(tensor for one in found for tensor in one.tensors))
        whole.dropped.append(Dropped(name, reason, sum(t.nbytes for t in tensors), tensors))
    return whole
