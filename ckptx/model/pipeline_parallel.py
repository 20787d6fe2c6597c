"""Which pipeline stage holds which layers: the placement rules of Megatron Core.

Chunks are listed in execution order, the order in which a microbatch meets them. With pipeline size
P and V virtual stages, chunk ``s`` belongs to pipeline rank ``s % P`` and virtual rank ``s // P``;
its layers follow those of chunk ``s - 1``.

Source: NVIDIA/Megatron-LM megatron/core/transformer/transformer_block.py, transformer_layer.py and
pipeline_parallel_layer_layout.py @ core_v0.16.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptx.errors import PlanError
from ckptx.model.sharding import Rank


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of a model that one virtual pipeline stage holds; ``layers`` are global numbers."""

    pp_rank: int
    vpp_rank: int
    layers: tuple[int, ...]
    embedding: bool
    output: bool
    mtp: bool = False
    """Whether it holds the layers of multi-token prediction, all of them."""


ARGS = {
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
    "layout": "pipeline_model_parallel_layout",
    "embedding_in_split": "account_for_embedding_in_pipeline_split",
    "loss_in_split": "account_for_loss_in_pipeline_split",
}
"""Megatron's arguments by the field of a `Pipeline`."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Pipeline settings, in Megatron's arguments: sizes, and how layers are spread.

    ``first`` and ``last`` are ``decoder_first_pipeline_num_layers`` and its counterpart, ``layout``
    is ``pipeline_model_parallel_layout``, the two booleans ``account_for_*_in_pipeline_split``.
    """

    pp: int = 1
    vpp: int | None = None
    first: int | None = None
    last: int | None = None
    layout: str | None = None
    embedding_in_split: bool = False
    loss_in_split: bool = False

    def chunks(self, num_layers: int, mtp_num_layers: int = 0) -> tuple[Chunk, ...]:
        """Return the chunks in execution order.

        Layers of multi-token prediction lie in the last one, unless a layout places them.

        Raises:
            PlanError: the settings do not place every layer exactly once.
        """
        uneven = self.first is not None or self.last is not None
        accounted = self.embedding_in_split or self.loss_in_split
        if uneven + accounted + (self.layout is not None) > 1:
            raise PlanError(
                f"{self}: a layout, sizes of the first and last stage, and embeddings or loss that "
                "count as layers exclude each other"
            )
        if self.layout is not None:
            return _from_layout(self.layout, self.pp, self.vpp, num_layers, mtp_num_layers)
        counts = self._counts(num_layers)
        if sum(counts) != num_layers or min(counts) < 0:
            virtual, fits = self.vpp or 1, ""
            if not (uneven or accounted or num_layers % virtual):
                fits = f": {divisors(num_layers // virtual)} would"
            raise PlanError(
                f"{num_layers} layers do not fit {self}{fits}; uneven stages are for "
                "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers or "
                "--pipeline-model-parallel-layout"
            )
        stages = ["t" * count for count in counts]
        stages[0] = f"E{stages[0]}"
        stages[-1] += "m" * bool(mtp_num_layers) + "L"
        return _placed(stages, self.pp)

    def __str__(self) -> str:
        """Return the settings as a user would say them."""
        words: dict[str, Any] = {
            "pipeline size": self.pp,
            "virtual size": self.vpp,
            "first stage": self.first,
        }
        words |= {"first stage": self.first, "last stage": self.last, "layout": self.layout}
        return ", ".join(f"{word} {value}" for word, value in words.items() if value is not None)

    def _counts(self, num_layers: int) -> list[int]:
        """Return the layers per chunk in execution order; not divisible shows as a wrong sum."""
        pp, vpp = self.pp, 1 if self.vpp is None else self.vpp
        if pp < 1 or vpp < 1:
            raise PlanError(f"{self}: sizes must be positive")
        if self.first is not None or self.last is not None:
            ends = (self.first is not None) + (self.last is not None)
            rest = num_layers - (self.first or 0) - (self.last or 0)
            if ends > pp or 0 in (self.first, self.last) or (rest == 0) != (pp == ends):
                raise PlanError(
                    f"{num_layers} layers do not fit {self}: every stage needs a rank and a layer"
                )
            middle = rest // (pp - ends) if pp > ends else 0
            stage = [middle] * pp
            if self.first is not None:
                stage[0] = self.first
            if self.last is not None:
                stage[-1] = self.last
            return [count // vpp for _ in range(vpp) for count in stage]
        total = num_layers + self.embedding_in_split + self.loss_in_split
        counts = [total // (pp * vpp)] * (pp * vpp)
        counts[0] -= self.embedding_in_split
        counts[-1] -= self.loss_in_split
        return counts

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Pipeline:
        """Return the settings that a checkpoint's ``args`` hold."""
        said: dict[str, Any] = {field: args.get(name) for field, name in ARGS.items()}
        pp, per_stage = said["pp"] or 1, args.get("num_layers_per_virtual_pipeline_stage")
        vpp = said["vpp"] or args.get("num_virtual_stages_per_pipeline_rank")
        if vpp is None and per_stage and pp > 1:
            vpp = args["num_layers"] // pp // per_stage
        layout = said["layout"]
        if layout is not None and not isinstance(layout, str):
            layout = _spelled(layout)
        said |= {field: bool(said[field]) for field in ("embedding_in_split", "loss_in_split")}
        return cls(**{**said, "pp": pp, "vpp": vpp, "layout": layout})

    def flags(self) -> list[str]:
        """Return the options that tell Megatron the same: it restores none of them by itself."""
        sized = {
            "--pipeline-model-parallel-size": self.pp,
            "--num-virtual-stages-per-pipeline-rank": self.vpp,
            "--decoder-first-pipeline-num-layers": self.first,
            "--decoder-last-pipeline-num-layers": self.last,
            "--pipeline-model-parallel-layout": repr(self.layout) if self.layout else None,
        }
        flags = [f"{name} {value}" for name, value in sized.items() if value is not None]
        flags += ["--account-for-embedding-in-pipeline-split"] * self.embedding_in_split
        flags += ["--account-for-loss-in-pipeline-split"] * self.loss_in_split
        return flags

    def to_args(self) -> dict[str, Any]:
        """Return the settings as entries of ``args``."""
        return {name: getattr(self, field) for field, name in ARGS.items()}


def stage_ranks(tp: int, ep: int = 1, etp: int | None = None) -> list[Rank]:
    """Return the ranks of one pipeline stage, in Megatron's order.

    Dense ranks run with ``tp`` fastest. Expert ranks run with ``etp`` (``tp`` unless given)
    fastest, then ``ep``; both grids lie over the same processes, as few as hold them.
    """
    etp = etp or tp
    return [
        Rank(tp, number % tp, ep, number // etp % ep, etp, number % etp)
        for number in range(math.lcm(tp, ep * etp))
    ]


def divisors(*numbers: int) -> str:
    """Return the sizes that divide all of some numbers, in words.

    Examples:
        >>> divisors(8), divisors(8, 12)
        ('1, 2, 4 or 8', '1, 2 or 4')
    """
    found = [str(n) for n in range(1, min(numbers) + 1) if not any(one % n for one in numbers)]
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]


def describe(chunks: Sequence[Chunk]) -> list[str]:
    """Return one line per chunk: rank, layers, and what else it holds.

    Examples:
        >>> describe(Pipeline(pp=2).chunks(4))
        ['pp 0: layers 0-1, embeddings', 'pp 1: layers 2-3, final norm, output layer']
    """
    virtual = any(chunk.vpp_rank for chunk in chunks)
    lines = []
    for chunk in chunks:
        place = f"pp {chunk.pp_rank}" + (f", vpp {chunk.vpp_rank}" if virtual else "")
        match chunk.layers:
            case ():
                held = ["no layers"]
            case (layer,):
                held = [f"layer {layer}"]
            case _:
                held = [f"layers {chunk.layers[0]}-{chunk.layers[-1]}"]
        held += ["embeddings"] * chunk.embedding + ["multi-token prediction"] * chunk.mtp
        held += ["final norm, output layer"] * chunk.output
        lines.append(f"{place}: {', '.join(held)}")
    return lines


def _placed(stages: Sequence[str], pp: int) -> tuple[Chunk, ...]:
    """Return the chunks of stages that are spelt in the letters of a layout."""
    chunks = []
    position = 0
    for number, stage in enumerate(stages):
        layers = range(position, position + stage.count("t"))
        position = layers.stop
        held = (letter in stage for letter in "ELm")
        chunks.append(Chunk(number % pp, number // pp, tuple(layers), *held))
    return tuple(chunks)


def _from_layout(
    layout: str, pp: int, vpp: int | None, num_layers: int, mtp_num_layers: int
) -> tuple[Chunk, ...]:
    stages = _expand(layout).split("|")
    expected = pp * (vpp or 1)
    if vpp is None and len(stages) % pp == 0:
        expected = len(stages)  # the layout itself says how many virtual stages there are
    if len(stages) != expected:
        raise PlanError(
            f"pipeline layout {layout!r} has {len(stages)} stages, {pp} x {vpp or 1} were asked for"
        )
    unknown = sorted(set("".join(stages)) - set("EtmL"))
    if unknown:
        raise PlanError(f"pipeline layout {layout!r}: unknown letters {', '.join(unknown)}")
    found = sum(stage.count("t") for stage in stages)
    if found != num_layers:
        raise PlanError(f"pipeline layout {layout!r} places {found} of {num_layers} layers")
    joined = "".join(stages)
    ends = joined[:1] + joined[-1:], joined.count("E"), joined.count("L")
    if ends != ("EL", 1, 1):
        raise PlanError(f"pipeline layout {layout!r} must begin with one E and end with one L")
    if "t" in joined.partition("m")[2]:
        raise PlanError(f"pipeline layout {layout!r} has decoder layers after an m")
    further = [stage.count("m") for stage in stages if "m" in stage]
    if sum(further) != mtp_num_layers or len(further) > 1:
        raise PlanError(
            f"pipeline layout {layout!r} places {sum(further)} layers of multi-token prediction in "
            f"{len(further)} stages, the model has {mtp_num_layers}, which one stage must hold"
        )
    return _placed(stages, pp)


def _expand(layout: str) -> str:
    """Return a layout with its repetitions written out.

    Examples:
        >>> _expand("Et*3|(tt|)*2L")
        'Ettt|tt|tt|L'
    """
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):  # as upstream: one level, brackets first
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return text


def _spelled(layout: Any) -> str:
    """Return a layout given as nested lists of stage names, or upstream's object, in letters."""
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    # PipelineParallelLayerLayout keeps what it was made from; its own ``layout`` is by rank.
    stages = getattr(layout, "input_data", layout)
    if isinstance(stages, str):
        return stages
    if not isinstance(stages, list | tuple):
        raise PlanError(f"cannot read the pipeline layout {layout!r} of the checkpoint's args")
    names = [
        [str(getattr(entry, "name", entry)).strip().lower() for entry in stage] for stage in stages
    ]
    return "|".join("".join(letters.get(name, name) for name in stage) for stage in names)
