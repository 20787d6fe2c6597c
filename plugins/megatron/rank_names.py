"""The names of ranks: their directories and files, and the parallel sizes that these say.

Source: NVIDIA/Megatron-LM megatron/training/checkpointing.py (get_checkpoint_name) @ core_v0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptx.containers import torch_zip
from ckptx.errors import FormatError, PlanError, listing
from ckptx.model.pipeline_parallel import stage_ranks
from ckptx.model.sharding import Rank
from ckptx.plugins.megatron.directory import RANK_FILES
from ckptx.storage.location import Location

_RANK_NAME = re.compile(r"mp_rank_\d{2,}(_\d{3,}){0,2}")
_FINAL_NORM = "decoder.final_layernorm.weight"


def _as_it_is(state: Any, _: Location) -> Any:
    return state


@dataclass(frozen=True, slots=True)
class Files:
    """How a framework names the file of a rank, and what it puts into it."""

    names: Sequence[str] = RANK_FILES
    """Those that it may have."""
    state: Callable[[Any, Location], Any] = _as_it_is
    """Returns what a file holds as Megatron has it: a dictionary with ``model`` or ``model0``..."""
    ending: str = ""
    """What follows a rank's name where that is a file, not a directory."""


def _of_engine(state: Any, path: Location) -> Any:
    if not isinstance(state, Mapping) or "module" not in state:
        raise FormatError(f"{path}: expected a dictionary of DeepSpeed with 'module'")
    return {"model" if key == "module" else key: value for key, value in state.items()}


MEGATRON_FILES = Files()
DEEPSPEED_FILES = Files((), _of_engine, "_model_states.pt")
"""Source: deepspeedai/Megatron-DeepSpeed megatron/checkpointing.py (save_checkpoint) @ f6e1e62."""


def directory_name(rank: Rank, pp_rank: int, pp: int) -> str:
    """Return the name of a rank's directory.

    The pipeline and the expert rank show only where there are several, so a name alone does not
    say which of the two its second number is.

    Examples:
        >>> directory_name(Rank(2, 1), 0, 1), directory_name(Rank(2, 1, ep=2, ep_rank=1), 0, 2)
        ('mp_rank_01', 'mp_rank_01_000_001')
    """
    name = f"mp_rank_{rank.tp_rank:02d}"
    name += f"_{pp_rank:03d}" if pp > 1 else ""
    return name + (f"_{rank.ep_rank:03d}" if rank.ep > 1 else "")


def stored_ranks(tp: int, ep: int, etp: int) -> list[Rank]:
    """Return the ranks of a stage that have a directory.

    Raises:
        PlanError: two ranks with different expert shards would have one name.
    """
    named: dict[tuple[int, int], Rank] = {}
    for rank in stage_ranks(tp, ep, etp):
        known = named.setdefault((rank.tp_rank, rank.ep_rank), rank)
        if known.etp_rank != rank.etp_rank:
            raise PlanError(
                f"expert-tensor-parallel size {etp} with tensor-parallel size {tp}: Megatron names "
                "the files of several ranks alike and overwrites them; use --ckpt-format torch_dist"
            )
    return list(named.values())


def parallel_sizes(
    args: Mapping[str, Any], found: list[Location], kind: Files
) -> tuple[int, int, int, int]:
    """Return the tensor-, pipeline-, expert- and expert-tensor-parallel sizes of a checkpoint.

    They are those of its args; without args, what the names in ``found`` say.

    Raises:
        FormatError: args or names contradict themselves.
    """
    if args:
        tp = args.get("tensor_model_parallel_size")
        tp = tp or len({tuple(path.name.split("_")[2:3]) for path in found})
        return tp, args.get("pipeline_model_parallel_size") or 1, *expert_sizes(args, tp)
    tp, pp, ep = _sizes_by_name(found, kind)
    return tp, pp, ep, tp


def expert_sizes(args: Mapping[str, Any], tp: int) -> tuple[int, int]:
    """Return the expert- and expert-tensor-parallel sizes that args say; 1 and TP without experts.

    Raises:
        FormatError: the experts do not divide by them.
    """
    if not (experts := args.get("num_experts")):
        return 1, tp
    ep = args.get("expert_model_parallel_size") or 1
    if experts % ep:
        raise FormatError(
            f"the args say {experts} experts over expert-parallel size {ep}, which does not divide "
            "them; they do not belong to this checkpoint"
        )
    return ep, args.get("expert_tensor_parallel_size") or tp


def models_in(state: Mapping[str, Any], path: Location) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the entries of a file that hold its virtual stages, in order."""
    keys = [key for key in state if isinstance(key, str) and re.fullmatch(r"model\d*", key)]
    if not keys:
        raise FormatError(f"{path}: holds no model ({listing(map(str, state))})")
    for key in sorted(keys, key=lambda key: int(key.removeprefix("model") or 0)):
        held = state[key]
        if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
            raise FormatError(f"{path}: {key!r} is no dictionary of tensors")
        yield key, state[key]


def rank_file(directory: Location, kind: Files) -> Location:
    """Return the file of a rank's directory.

    Raises:
        FormatError: there is none.
    """
    if kind.ending:
        return directory
    for name in kind.names:
        if (directory / name).is_file():
            return directory / name
    raise FormatError(f"{directory}: holds no {kind.names[0]}; the checkpoint is incomplete")


def rank_directories(directory: Location, kind: Files = MEGATRON_FILES) -> list[Location]:
    """Return the directories, or the files, of all ranks by name."""
    found = directory.glob(f"mp_rank_*{kind.ending}")
    return sorted(path for path in found if path.is_dir() != bool(kind.ending))


def _sizes_by_name(found: list[Location], kind: Files) -> tuple[int, int, int]:
    """Return the tensor-, pipeline- and expert-parallel sizes that the ranks' names say.

    A second number without a third is the pipeline rank, or the expert rank: of several pipeline
    ranks the first has no final norm.

    Raises:
        FormatError: a name is none that Megatron gives.
    """
    numbers = []
    for path in found:
        name = path.name.removesuffix(kind.ending)
        if not _RANK_NAME.fullmatch(name):
            raise FormatError(
                f"{path}: expected mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE; move away "
                "what does not belong to this checkpoint"
            )
        numbers.append(tuple(map(int, name.split("_")[2:])))
    if len({len(number) for number in numbers}) > 1:
        raise FormatError(
            f"{found[0].parent}: {found[0].name} and {found[-1].name} are named for different "
            "parallel sizes; the directory mixes checkpoints"
        )
    sizes = [max(column) + 1 for column in zip(*numbers, strict=True)]
    if len(sizes) > 1 and set(sizes[1:]) == {1}:
        raise FormatError(
            f"{found[0].parent}: {found[-1].name} is named as one of several pipeline or expert "
            "ranks, of which only the first is there; copy the others"
        )
    if len(sizes) == 2:
        path = rank_file(found[0], kind)
        models = dict(models_in(kind.state(torch_zip.read(path, 0), path), path))
        if any(_FINAL_NORM in model for model in models.values()):
            sizes.insert(1, 1)
    tp, pp, ep = (*sizes, 1, 1)[:3]
    return tp, pp, ep
