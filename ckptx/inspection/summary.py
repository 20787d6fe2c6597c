"""Say what a checkpoint is, from its metadata; on request, what its values are like."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptx.errors import CkptxError, PlanError, listing
from ckptx.inspection.layers import layer_number
from ckptx.inspection.statistics import Statistics, statistics_of
from ckptx.model.pipeline_parallel import Pipeline, describe
from ckptx.protocol.messages import TRAINING_STATE, Begin
from ckptx.protocol.model import Model
from ckptx.protocol.progress import Progress
from ckptx.registry.open import Checkpoint, Problem, opened
from ckptx.storage.location import Location
from ckptx.storage.partial import PARTIAL
from ckptx.tensors.lazy import Filled, LazyTensor
from ckptx.tensors.placement import describe_partition, placement_of, stored_dtypes
from ckptx.text.plain import plain
from ckptx.text.shown import Shown

SCHEMA = "ckptx-inspect/1"
"""What the JSON of an inspection is; the number rises when a key changes its meaning."""


def unreadable(path: Path, format: str | None, message: str) -> dict[str, Any]:
    """Return the keys of an `Inspection` that are known of what no loader can read, for JSON."""
    return {
        "schema": SCHEMA,
        "path": str(path),
        "healthy": False,
        "problems": [asdict(Problem("unreadable", message))],
        "format": format,
    }


@dataclass(frozen=True, slots=True)
class Inspection(Shown):
    """What a checkpoint holds. Sizes are in bytes."""

    path: str
    begin: Begin
    model: Model
    problems: tuple[Problem, ...]
    names: str
    """How `tensors` are named: ``huggingface``, ``canonical`` or ``stored``."""
    tensors: Mapping[str, LazyTensor]
    """The tensors that were asked for."""
    parameters: int
    """The elements of all weights; copies once, padding of the vocabulary not at all."""
    stages: tuple[str, ...] = ()
    """Which pipeline stage holds which layers; none where there is one stage."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    listed: bool = False
    """Whether people see the tensors, too."""
    fold: bool = True
    """Whether layers that are alike are shown once."""

    @property
    def healthy(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    @property
    def iteration(self) -> int | str | None:
        """The step of the training; ``"release"`` or None where there is none."""
        steps = self.begin.training.get("global_steps")
        return self.begin.training.get("iteration") if steps is None else steps

    def render(self, width: int = 80) -> str:
        """Return the inspection as text of at most ``width`` columns."""
        from ckptx.inspection.text import render

        return render(self, width)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; every key is always there."""
        spec = self.begin.parts.get("language")
        return {
            "schema": SCHEMA,
            "path": self.path,
            "healthy": self.healthy,
            "problems": [asdict(problem) for problem in self.problems],
            "format": self.begin.format,
            "layout": self.begin.layout,
            "family": self._family(),
            "architecture": spec.architecture if spec else None,
            "parameters": self.parameters,
            "bytes": sum(entry["bytes"] for entry in self.dtypes().values()),
            "dtypes": self.dtypes(),
            "iteration": self.iteration,
            "parallel": self.parallel(),
            "stages": list(self.stages),
            "parts": {part: plain(one.dimensions()) for part, one in self.begin.parts.items()},
            "files": [
                {"path": self.place(number), "bytes": _size_of(file)}
                for number, file in enumerate(self.begin.files)
            ],
            "sidecars": sorted(self.begin.sidecars),
            "training_state": self.left(training=True),
            "left_out": self.left(training=False),
            "notes": self.notes(),
            "names": self.names,
            "tensors": [self._tensor(name, tensor) for name, tensor in self.tensors.items()],
        }

    def parallel(self) -> dict[str, Any]:
        """Return how the checkpoint is split, as plain values."""
        shown: dict[str, Any] = {}
        for name, value in self.begin.parallel.items():
            if isinstance(value, Pipeline):
                shown |= {"pp": value.pp, "vpp": value.vpp}
            else:
                shown[name] = plain(value)
        return shown

    def left(self, *, training: bool) -> list[dict[str, Any]]:
        """Return what is no weight: the state of the training, or all else."""
        return [
            drop.to_json()
            for drop in self.model.end.dropped
            if (drop.reason == TRAINING_STATE) == training
        ]

    def notes(self) -> list[str]:
        """Return the remarks of the loader, and what is odd about the values without being wrong.

        A file of which not all has arrived often has its full size, and zeros for the rest.
        """
        zeros = [
            name
            for name, one in self.statistics.items()
            if one.zeros == one.elements > 0 and len(self.tensors[name].shape) > 1
        ]
        notes = list(self.model.end.notes)
        if zeros:
            notes.append(f"all zeros, as where a file has not arrived in full: {listing(zeros, 5)}")
        return notes

    def _family(self) -> str | None:
        spec = self.begin.parts.get("language")
        return self.begin.family or (spec.family if spec else None)

    def dtypes(self) -> dict[str, dict[str, int]]:
        """Return what is stored of every dtype, the largest first; shared bytes count once."""
        found: dict[str, dict[str, int]] = {}
        for extent in dict.fromkeys(source.extent for source in self.begin.sources):
            own = found.setdefault(extent.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
            own["tensors"] += 1
            own["elements"] += extent.numel
            own["bytes"] += extent.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))

    def _tensor(self, name: str, tensor: LazyTensor) -> dict[str, Any]:
        shards = placement_of(tensor)
        found: dict[str, Any] = {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "stored_dtypes": list(stored_dtypes(tensor)),
            "cut": describe_partition(tensor.shape, shards),
            "shards": [
                {
                    "file": self.place(shard.file),
                    "box": [list(bounds) for bounds in shard.box],
                    "elements": shard.elements,
                }
                for shard in shards
            ],
        }
        if name in self.statistics:
            found["stats"] = self.statistics[name].to_json()
        return found

    def place(self, number: int) -> str:
        """Return the path of a file, below the checkpoint where it lies there."""
        path = Path(self.begin.files[number]).absolute()
        root = Path(self.begin.root or ".").absolute()
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which tensors are shown, and what of them."""

    names: str = "model"
    """``"model"``: whole tensors by Hugging Face's names; ``"stored"``: as the files hold them."""
    pattern: str | None = None
    layers: frozenset[int] | None = None
    tree: bool = False
    stats: bool = False

    @property
    def narrow(self) -> bool:
        """Whether not all tensors are wanted."""
        return self.pattern is not None or self.layers is not None


def inspect(
    source: Checkpoint | Path, wanted: Wanted | None = None, progress: Progress | None = None
) -> Inspection:
    """Return what a checkpoint holds, an open one or the one at a path.

    ``progress`` counts what is read for statistics.

    Raises:
        CkptxError: it cannot be read, or holds no tensor that was asked for.
    """
    wanted = wanted or Wanted()
    with opened(source) as checkpoint:
        path = checkpoint.path
        model, problems = checkpoint.model, checkpoint.problems
        named, whole = checkpoint.tensors()
        weights = dict.fromkeys(
            tensor for tensor in whole.values() if not isinstance(tensor, Filled)
        )
        parameters = sum(tensor.numel for tensor in weights)
        if wanted.names == "stored":
            named, whole = checkpoint.tensors("stored")
        tensors = _chosen(path, whole, wanted)
        statistics: dict[str, Statistics] = {}
        if wanted.stats:
            progress = progress or Progress()
            progress.begin(sum(tensor.nbytes for tensor in tensors.values()), "reading")
            statistics = statistics_of(tensors, model.begin.files, progress.advance)
            problems += _values(statistics)
    stages: tuple[str, ...] = ()
    try:
        stages = _stages(model.begin)
    except CkptxError as error:
        problems += (Problem("incomplete", f"{path}: {error}"),)
    if path.name.endswith(PARTIAL):
        problems += (Problem("unfinished", f"{path}: what a killed conversion left behind"),)
    return Inspection(
        str(path),
        model.begin,
        model,
        problems,
        named,
        tensors,
        parameters,
        stages,
        statistics,
        listed=wanted.tree or (wanted.narrow and not wanted.stats),
        fold=not wanted.narrow,
    )


def _stages(begin: Begin) -> tuple[str, ...]:
    """Return which pipeline stage holds which layers.

    Raises:
        PlanError: args tell stages into which the layers do not divide.
    """
    pipeline = begin.parallel.get("pipeline")
    spec = begin.parts.get("language")
    if not isinstance(pipeline, Pipeline) or spec is None or pipeline.pp == 1:
        return ()
    return tuple(describe(pipeline.chunks(spec.num_layers, spec.mtp_num_layers)))


def _chosen(
    path: Location, tensors: Mapping[str, LazyTensor], wanted: Wanted
) -> Mapping[str, LazyTensor]:
    """Return the tensors that are asked for.

    Raises:
        PlanError: there is none.
    """
    if not wanted.narrow:
        return tensors
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if (wanted.pattern is None or fnmatch.fnmatchcase(name, wanted.pattern))
        and (wanted.layers is None or layer_number(name) in wanted.layers)
    }
    if not found:
        first = next(iter(tensors), "none")
        raise PlanError(
            f"{path}: no tensor is of those asked for; there are {len(tensors):,}, as {first!r}"
        )
    return found


def _values(statistics: Mapping[str, Statistics]) -> tuple[Problem, ...]:
    """Return the tensors that hold what is no number."""
    found = []
    for name, one in statistics.items():
        for kind, count in (("nan", one.nan), ("inf", one.inf)):
            if count:
                word = "NaN" if kind == "nan" else "infinite"
                text = f"{name}: {count:,} of {one.elements:,} elements are {word}"
                found.append(Problem(kind, text, name))
    return tuple(found)


def _size_of(file: str) -> int | None:
    try:
        return Path(file).stat().st_size
    except OSError:
        return None
