"""Say what a checkpoint is, from its metadata; on request, what its values are like.

Whatever a loader reads can be inspected. Tensors are shown whole and under the names that Hugging
Face has for them where a schema knows the model, whatever the ranks hold of each; or as the files
spell them (``names="stored"``).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ckptx import manager
from ckptx.errors import CkptxError, PlanError, listing
from ckptx.lazy import Filled, LazyTensor
from ckptx.model_directory import hf_tensors
from ckptx.parallel import Pipeline, describe
from ckptx.progress import Progress, Silent
from ckptx.protocol import WEIGHTS_ONLY, Begin, End, Message
from ckptx.publish import PARTIAL, size_text
from ckptx.report import wrapped
from ckptx.saving import Model, collect
from ckptx.shards import Shard, partition_text, shards_of
from ckptx.spec import ModelSpec
from ckptx.tensor_stats import Statistics, statistics_of
from ckptx.tensor_tree import Row, layer_number, tree

SCHEMA = "ckptx-inspect/1"
"""What the JSON of an inspection is; the number rises when a key changes its meaning."""
_LABEL = 12  # columns
_FILES = 3  # files of a tensor in the text form
_STAGES = 16  # pipeline stages in the text form
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a checkpoint.

    ``kind`` is ``unreadable``, ``incomplete`` (tensors do not fit the model that config or args
    describe), ``unfinished`` (a conversion was killed), ``nan`` or ``inf``.
    """

    kind: str
    message: str
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A checkpoint that no loader can read, as JSON; people get the error itself."""

    path: str
    format: str | None
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return the keys that an `Inspection` has, as far as they are known."""
        problem = Problem("unreadable", self.message)
        return {
            "schema": SCHEMA,
            "path": self.path,
            "healthy": False,
            "problems": [asdict(problem)],
            "format": self.format,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
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
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    listed: bool = False
    """Whether people see the tensors, too."""
    fold: bool = True
    """Whether layers that are alike are shown once."""

    @property
    def healthy(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

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
            "bytes": sum(entry["bytes"] for entry in self._dtypes().values()),
            "dtypes": self._dtypes(),
            "iteration": self.begin.training.get("iteration"),
            "parallel": _parallel(self.begin.parallel),
            "stages": self._stages(),
            "parts": {part: _plain(asdict(one)) for part, one in self.begin.parts.items()},
            "files": [
                {"path": self._place(number), "bytes": _size_of(file)}
                for number, file in enumerate(self.begin.files)
            ],
            "sidecars": sorted(self.begin.sidecars),
            "training_state": self._left(training=True),
            "left_out": self._left(training=False),
            "notes": self._notes(),
            "names": self.names,
            "tensors": [self._tensor(name, tensor) for name, tensor in self.tensors.items()],
        }

    def render(self, width: int) -> str:
        """Return the summary, and what was asked for of the tensors, for ``width`` columns."""
        lines = [line for pair in self._summary() for line in wrapped(*pair, width, _LABEL)]
        if self.listed and self.tensors:
            lines += ["", *tree(list(self._rows()), width, fold=self.fold)]
        if self.statistics:
            lines += ["", *_table(self.statistics, width)]
        return "\n".join(lines)

    def _summary(self) -> Iterator[tuple[str, str]]:
        begin = self.begin
        yield "path", self.path
        yield "format", f"{begin.format}, names of {begin.layout}"
        yield "model", _model_text(begin.parts.get("language")) or "of no known family"
        for part, one in begin.parts.items():
            if part != "language":
                layers = f", {one.num_layers} layers" if one.num_layers else ""
                yield part, f"{one.family}{layers}"
        yield "parameters", f"{self.parameters:,}{_short(self.parameters)}"
        dtypes = self._dtypes()
        size, count = (sum(sums[key] for sums in dtypes.values()) for key in ("bytes", "tensors"))
        files = len(begin.files)
        yield "stored", f"{size_text(size)}, {count:,} tensors, {files:,} file{'s' * (files != 1)}"
        for dtype, sums in dtypes.items():
            yield "", f"{dtype}: {size_text(sums['bytes'])}, {sums['tensors']:,} tensors"
        iteration = begin.training.get("iteration")
        if iteration is not None and (iteration != "release" or "pipeline" in begin.parallel):
            yield "iteration", str(iteration)
        experts = any(one.num_experts for one in begin.parts.values())
        if sizes := _parallel_text(begin.parallel, experts):
            yield "parallel", sizes
        yield from (("", stage) for stage in self._stages()[:_STAGES])
        if begin.sidecars:
            yield "beside", ", ".join(sorted(begin.sidecars))
        state = self._left(training=True)
        if state:
            total = size_text(sum(entry["bytes"] for entry in state))
            named = ", ".join(_sized(entry["name"], entry["bytes"]) for entry in state)
            yield "training", f"{total} of state: {named}"
        reasons: dict[str, list[str]] = {}
        for entry in self._left(training=False):
            text = _sized(entry["name"], entry["bytes"])
            reasons.setdefault(entry["reason"], []).append(text)
        for reason, found in reasons.items():
            more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
            yield "left out", f"{', '.join(found[:5])}{more}: {reason}"
        yield from (("note", note) for note in self._notes())
        yield from (("problem", problem.message) for problem in self.problems)
        yield "health", self._health()

    def _stages(self) -> list[str]:
        """Return which pipeline stage holds which layers, nothing where there is one stage."""
        pipeline = self.begin.parallel.get("pipeline")
        spec = self.begin.parts.get("language")
        if not isinstance(pipeline, Pipeline) or spec is None or pipeline.pp == 1:
            return []
        return describe(pipeline.chunks(spec.num_layers, spec.mtp_num_layers))

    def _health(self) -> str:
        if not self.healthy:
            count = len(self.problems)
            return f"{count} problem{'s' * (count != 1)}, see above"
        looked = "values looked at" if self.statistics else "values not looked at (--stats does)"
        return f"no problem found; {looked}"

    def _left(self, *, training: bool) -> list[dict[str, Any]]:
        return [
            {
                "name": drop.name,
                "reason": drop.reason,
                "bytes": drop.nbytes or sum(tensor.nbytes for tensor in drop.tensors),
            }
            for drop in self.model.end.dropped
            if (drop.reason == WEIGHTS_ONLY) == training
        ]

    def _notes(self) -> list[str]:
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

    def _dtypes(self) -> dict[str, dict[str, int]]:
        """Return what is stored of every dtype, the largest first; shared bytes count once."""
        found: dict[str, dict[str, int]] = {}
        for extent in dict.fromkeys(source.extent for source in self.begin.sources):
            own = found.setdefault(extent.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
            own["tensors"] += 1
            own["elements"] += extent.numel
            own["bytes"] += extent.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))

    def _tensor(self, name: str, tensor: LazyTensor) -> dict[str, Any]:
        shards = shards_of(tensor)
        found: dict[str, Any] = {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "cut": partition_text(tensor.shape, shards),
            "shards": [
                {
                    "file": self._place(shard.file),
                    "box": [list(bounds) for bounds in shard.box],
                    "elements": shard.elements,
                }
                for shard in shards
            ],
        }
        if name in self.statistics:
            found["stats"] = self.statistics[name].to_json()
        return found

    def _rows(self) -> Iterator[Row]:
        for name, tensor in self.tensors.items():
            shards = shards_of(tensor)
            cut = partition_text(tensor.shape, shards)
            what = f"{tensor.dtype:<8} {shape_text(tensor.shape)}"
            yield Row(name, what, cut, self._files(shards), tensor.nbytes)

    def _files(self, shards: Sequence[Shard]) -> str:
        files = list(dict.fromkeys(self._place(shard.file) for shard in shards))
        rest = f" and {len(files) - _FILES:,} more" if len(files) > _FILES else ""
        return f"{', '.join(files[:_FILES])}{rest}"

    def _place(self, number: int) -> str:
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
    path: Path,
    loader: str | None = None,
    options: Mapping[str, Any] | None = None,
    wanted: Wanted | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Return what the checkpoint at ``path`` holds; the loader is detected unless named.

    ``options`` are the loader's; ``progress`` is told what is read for statistics.

    Raises:
        CkptxError: it cannot be read, or holds no tensor that was asked for.
    """
    wanted = wanted or Wanted()
    model, problems = opened(path, loader, options)
    named, whole = names_of(model)
    weights = dict.fromkeys(tensor for tensor in whole.values() if not isinstance(tensor, Filled))
    parameters = sum(tensor.numel for tensor in weights)
    if wanted.names == "stored":
        named, whole = names_of(model, "stored")
    tensors = _chosen(path, whole, wanted)
    statistics: dict[str, Statistics] = {}
    if wanted.stats:
        progress = progress or Silent()
        progress.begin(sum(tensor.nbytes for tensor in tensors.values()), "reading")
        statistics = statistics_of(tensors, model.begin.files, progress.advance)
        problems += _values(statistics)
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
        statistics,
        listed=wanted.tree or (wanted.narrow and not wanted.stats),
        fold=not wanted.narrow,
    )


def opened(
    path: Path, loader: str | None, options: Mapping[str, Any] | None
) -> tuple[Model, tuple[Problem, ...]]:
    """Return a checkpoint, and what is wrong with it if its tensors can still be listed.

    Raises:
        CkptxError: it cannot be read.
    """
    plugin = manager.loader(loader or manager.detect(path))
    messages: Iterator[Message] = iter(plugin.load(path, options or {}))
    begin = next(messages, None)
    if not isinstance(begin, Begin):
        return collect(iter([begin] if begin else [])), ()
    try:
        return collect(chain([begin], messages)), ()
    except CkptxError as error:
        return Model(begin, End()), (Problem("incomplete", str(error)),)


def names_of(model: Model, names: str = "model") -> tuple[str, Mapping[str, LazyTensor]]:
    """Return how the tensors of a model are named, and the tensors.

    With ``names`` ``"model"`` they are whole: under Hugging Face's names, or canonical ones
    (``"transformer layer 0: qkv weight"``) where Hugging Face has none. With ``"stored"``, and
    where nothing else is known, each is what one place of the files holds.
    """
    if names != "stored" and model.passthrough is not None:
        hf = model.begin.layout.startswith("hf")
        return "huggingface" if hf else "stored", model.passthrough
    if names != "stored" and model.messages:
        try:  # on a copy: the names of Hugging Face have no padding
            return "huggingface", hf_tensors(replace(model, messages=dict(model.messages)))[0]
        except CkptxError as error:
            _log.info("no names of Hugging Face: %s", error)
        return "canonical", {
            f"{message}: {key}": tensor
            for message, tensors in model.messages.items()
            for key, tensor in tensors.items()
        }
    return "stored", {source.name: source.extent for source in model.begin.sources}


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape for people.

    Examples:
        >>> shape_text((32000, 4096)), shape_text(())
        ('[32000, 4096]', '[]')
    """
    return str(list(shape))


def _chosen(
    path: Path, tensors: Mapping[str, LazyTensor], wanted: Wanted
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


def _table(statistics: Mapping[str, Statistics], width: int) -> Iterator[str]:
    """Yield a table; where a name and its numbers do not fit one line, they take two."""
    head = f"{'min':>10} {'max':>10} {'mean':>10} {'std':>10}  not finite"
    longest = max(map(len, statistics))
    column = longest if longest + 2 + len(head) <= width else 0
    yield f"{'':<{column}}  {head}"
    for name, one in statistics.items():
        values = (one.minimum, one.maximum, one.mean, one.std)
        numbers = " ".join(f"{'-':>10}" if v is None else f"{v:>10.4g}" for v in values)
        wrong = [f"{one.nan:,} NaN"] * bool(one.nan) + [f"{one.inf:,} infinite"] * bool(one.inf)
        numbers += f"  {', '.join(wrong) or '-'}"
        if column:
            yield f"{name:<{column}}  {numbers}"
        else:
            yield name
            yield f"  {numbers}"


def _model_text(spec: ModelSpec | None) -> str:
    if spec is None:
        return ""
    text = f"{spec.family} ({spec.architecture}), {spec.num_layers} layers, hidden size "
    text += f"{spec.hidden_size}, {spec.num_attention_heads} heads"
    if spec.num_query_groups not in (None, spec.num_attention_heads):
        text += f", {spec.num_query_groups} query groups"
    if spec.num_experts:
        text += f", {spec.num_experts} experts"
    if spec.vocab_size:
        text += f", vocabulary {spec.vocab_size:,}"
    return text


def _short(count: int) -> str:
    """Return what a model of so many parameters is called, as `` (8.03B)``."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f" ({count / size:.3g}{letter})"
    return ""


def _sized(name: str, nbytes: int) -> str:
    return f"{name} ({size_text(nbytes)})" if nbytes else name


def _size_of(file: str) -> int | None:
    try:
        return Path(file).stat().st_size
    except OSError:
        return None


_PARALLEL = {
    "tp": "TP {}",
    "pp": "PP {}",
    "vpp": "VPP {}",
    "ep": "EP {}",
    "etp": "ETP {}",
    "world_size": "world size {}",
    "zero_stage": "ZeRO stage {}",
    "fsdp_version": "FSDP {}",
    "ckpt_format": "{}",
}


def _parallel_text(parallel: Mapping[str, Any], experts: bool) -> str:
    shown = _parallel(parallel)
    return ", ".join(
        text.format(shown[key])
        for key, text in _PARALLEL.items()
        if shown.get(key) is not None and (experts or key not in ("ep", "etp"))
    )


def _parallel(parallel: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in parallel.items():
        if isinstance(value, Pipeline):
            shown["pp"] = value.pp
            shown["vpp"] = value.vpp
        else:
            shown[name] = _plain(value)
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
