"""Whether the files of a per-rank checkpoint belong together: one run, one file for each rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from ckptx.containers.copies import alike, copy_of, rows_differ
from ckptx.errors import FormatError, listing
from ckptx.model.sharding import Rank
from ckptx.storage.location import Location
from ckptx.tensors.lazy import LazyTensor

_SAME = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "num_layers", "hidden_size", "num_experts"),
)

_COLUMN_PARALLEL = re.compile(
    r"(?<!experts\.)\b(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc1|"
    r"query_key_value|dense_h_to_4h|word_embeddings|output_layer)\.weight$"
)

_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.linear_fc[12]\.weight)\d+$")
"""The number of an expert in the name of its weight."""


class _Place(NamedTuple):
    """The ranks of a file."""

    pp: int
    ep: int
    tp: int


@dataclass(slots=True)
class RankFile:
    """One rank's file: its weights per virtual stage, everything else by size."""

    path: Location
    args: dict[str, Any]
    iteration: Any
    version: Any
    models: list[dict[str, LazyTensor]]
    states: int
    """Bytes of extra states."""
    other: dict[str, int]

    @property
    def label(self) -> str:
        """The name of the rank: of its directory, or of a file beside those of the others."""
        own = self.path.name
        return own.partition("_model")[0] if own.startswith("mp_rank_") else self.path.parent.name


def check_directories(directory: Location, expected: list[str], found: list[str]) -> None:
    """Raise a FormatError unless there is a directory for each rank, and no other."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        raise FormatError(
            f"{directory}: {len(missing)} of {len(expected)} rank directories are missing: "
            f"{listing(missing)}; copy them"
        )
    if extra:
        raise FormatError(
            f"{directory}: {listing(extra)} do not belong to the {len(expected)} ranks that the "
            "args name; the directory mixes checkpoints"
        )


def check_same_run(first: RankFile, rank: RankFile) -> None:
    """Raise a FormatError unless a file is of the first one's run."""
    here, there = (
        {**{name: file.args.get(name) for name in _SAME}, "checkpoint_version": file.version}
        for file in (first, rank)
    )
    for name, value in there.items():
        if value != here[name]:
            raise FormatError(
                f"{rank.path}: {name} is {value}, in {first.label} it is {here[name]}; "
                "the rank files are of different runs"
            )
    if first.iteration != rank.iteration:
        raise FormatError(
            f"{rank.path}: is of iteration {rank.iteration}, {first.label} of "
            f"{first.iteration}; the rank files are of different runs"
        )


def check_copies(grid: Sequence[RankFile], ranks: Sequence[Rank]) -> list[str]:
    """Raise if one file is in the place of two; return remarks on those that only look so.

    Files may be alike of tensor-parallel ranks that hold nothing but padding and what is not cut,
    of expert-parallel ranks in a stage whose layers are all dense, and of models whose experts or
    layers repeat, which they then do on every tensor-parallel rank.

    Raises:
        FormatError: a file is a copy.
    """
    paths = [file.path for file in grid]
    places = [
        _Place(number // len(ranks), rank.ep_rank, rank.tp_rank)
        for number, rank in enumerate([*ranks] * (len(grid) // len(ranks)))
    ]
    numbers = {place: number for number, place in enumerate(places)}
    pairs = set(alike(paths))
    repeated = []
    for one, other in sorted(pairs):
        here, there = places[one], places[other]
        if here.tp != there.tp:
            if rows_differ(paths, _cut_by_rows(grid[one])):
                raise copy_of(paths[other], paths[one])
            continue
        if here.pp == there.pp and not _has_experts(grid[one]):
            continue
        on_every_rank = all(
            (numbers[here._replace(tp=tp)], numbers[there._replace(tp=tp)]) in pairs
            for tp in {rank.tp_rank for rank in ranks}
        )
        same_stage = [number for place, number in numbers.items() if place[::2] == here[::2]]
        differ = not all(pair in pairs for pair in combinations(same_stage, 2))
        if not on_every_rank or (
            here.pp == there.pp
            and (differ or _experts_differ(paths, grid[one]))
            and _routed_apart(paths, grid[one], (here.ep, there.ep), len(same_stage))
        ):
            raise copy_of(paths[other], paths[one])
        repeated.append(f"{paths[other].parent.name} as {paths[one].parent.name}")
    if not repeated:
        return []
    return [
        f"rank files hold the same weights ({listing(repeated, 3)}): experts or layers that "
        "repeat, or a file that was copied to the wrong place; compare with the original"
    ]


def _cut_by_rows(file: RankFile) -> Iterator[LazyTensor]:
    """Yield the weights of which tensor-parallel ranks hold different rows.

    Source: NVIDIA/Megatron-LM megatron/core/models/gpt/gpt_layer_specs.py (column-parallel
    layers), megatron/legacy/model/transformer.py @ core_v0.16.1.
    """
    for model in file.models:
        yield from (t for name, t in model.items() if _COLUMN_PARALLEL.search(name))


def _has_experts(file: RankFile) -> bool:
    return any("experts." in name for model in file.models for name in model)


def _experts_differ(paths: Sequence[Location], file: RankFile) -> bool:
    """Return whether a file holds experts that differ, as far as their first rows show.

    The stacked ``weight1`` is [hidden, experts * ffn], and is not looked into.
    """
    from ckptx.storage.gather import read

    files = [str(path) for path in paths]
    rows: dict[str, set[bytes]] = {}
    for index, model in enumerate(file.models):
        for name, weight in model.items():
            if _EXPERT.search(name) and len(weight.shape) == 2:
                row = weight.narrow(0, 0, 1).narrow(1, 0, min(weight.shape[1], 4096))
                alike_named = f"{index} {_EXPERT.sub('', name)}"
                rows.setdefault(alike_named, set()).add(read(row, files).tobytes())
    return any(len(found) > 1 for found in rows.values())


def _routed_apart(
    paths: Sequence[Location], file: RankFile, ep_ranks: tuple[int, int], ep: int
) -> bool:
    """Return whether a router has different rows for the experts of two ranks.

    Every rank holds the whole router, [experts, hidden]. A model whose experts are copies of
    others (granular upcycling) routes tokens to them alike.
    """
    from ckptx.storage.gather import read

    files = [str(path) for path in paths]
    for model in file.models:
        for name, router in model.items():
            if name.endswith("router.weight") and router.shape[0] % ep == 0:
                one, other = (router.chunk(0, ep, rank) for rank in ep_ranks)
                if read(one, files).tobytes() != read(other, files).tobytes():
                    return True
    return False


def check_order(grid: list[RankFile], ranks: Sequence[Rank]) -> None:
    """Raise if files are in each other's place, as far as their args tell.

    Megatron saves the args of the process: its ``rank`` grows with the tensor-parallel rank, and
    with the pipeline rank. Tools that convert have one rank in all files, or none.

    Source: NVIDIA/Megatron-LM megatron/core/parallel_state.py (RankGenerator: "tp-cp-ep-dp-pp" and
    "tp-cp-ep-pp-dp") @ core_v0.16.1.
    """
    if len({rank.args.get("rank") for rank in grid}) < 2:
        return
    held: dict[tuple[str, int], list[RankFile]] = {}
    for number, file in enumerate(grid):
        pp_rank, index = divmod(number, len(ranks))
        rank = ranks[index]
        if rank.ep_rank == 0:  # the files of other experts are of other data-parallel ranks
            held.setdefault(("tensor", pp_rank), []).append(file)
            held.setdefault(("pipeline", rank.tp_rank), []).append(file)
    for (axis, *_), files in held.items():
        for before, after in pairwise(files):
            low, high = before.args.get("rank"), after.args.get("rank")
            if type(low) is int and type(high) is int and low >= high:
                raise FormatError(
                    f"{after.path}: its args are of rank {high}, expected one above {low}, which "
                    f"{before.label} of the {axis}-parallel rank before is of; the "
                    "files are in each other's place, copy them again"
                )
