"""An inspection as text: a summary, a tree of tensors, a table of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptx.errors import first_few
from ckptx.inspection.statistics import Statistics
from ckptx.inspection.summary import Inspection
from ckptx.model.spec import ModelSpec
from ckptx.tensors.placement import Shard, describe_partition, placement_of, stored_dtypes
from ckptx.text.sizes import size_text
from ckptx.text.tree import Row, tree
from ckptx.text.wrapping import labelled

_LABEL = 12  # columns
_FILES = 3  # files of a tensor
_STAGES = 16  # pipeline stages
_PROBLEMS = 20
_NAMES = 5  # things that are left out for one reason
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
"""How sizes are shown, in this order; those that a checkpoint does not tell are not."""


def render(found: Inspection, width: int) -> str:
    """Return the summary, and what was asked for of the tensors, for ``width`` columns."""
    lines = labelled(_summary(found), width, _LABEL)
    if found.listed and found.tensors:
        lines += ["", *tree(list(_rows(found)), width, fold=found.fold)]
    if found.statistics:
        lines += ["", *_table(found.statistics, width)]
    return "\n".join(lines)


def _summary(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield labels and texts."""
    begin = found.begin
    yield "path", found.path
    yield "format", f"{begin.format}, names of {begin.layout}"
    yield "model", _model_text(begin.parts.get("language")) or "of no known family"
    for part, one in begin.parts.items():
        if part != "language":
            layers = f", {one.num_layers} layers" if one.num_layers else ""
            yield part, f"{one.family}{layers}"
    yield "parameters", f"{found.parameters:,}{_short(found.parameters)}"
    yield from _stored(found)
    if found.iteration not in (None, "release") or "pipeline" in begin.parallel:
        yield "iteration", str(found.iteration)
    experts = any(one.num_experts for one in begin.parts.values())
    if sizes := _parallel_text(found.parallel(), experts):
        yield "parallel", sizes
    yield from (("", stage) for stage in found.stages[:_STAGES])
    if begin.sidecars:
        yield "beside", ", ".join(sorted(begin.sidecars))
    yield from _left(found)
    yield from (("note", note) for note in found.notes())
    yield from _health(found)


def _stored(found: Inspection) -> Iterator[tuple[str, str]]:
    dtypes = found.dtypes()
    size, count = (sum(sums[key] for sums in dtypes.values()) for key in ("bytes", "tensors"))
    files = len(found.begin.files)
    yield "stored", f"{size_text(size)}, {count:,} tensors, {files:,} file{'s' * (files != 1)}"
    for dtype, sums in dtypes.items():
        yield "", f"{dtype}: {size_text(sums['bytes'])}, {sums['tensors']:,} tensors"


def _left(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield the state of the training, then what else is no weight, by its reason."""
    state = found.left(training=True)
    if state:
        size = sum(entry["bytes"] for entry in state)  # none where nothing of it is a tensor
        total = f"{size_text(size)} of state: " if size else ""
        named = ", ".join(_sized(entry["name"], entry["bytes"]) for entry in state)
        yield "training", f"{total}{named}"
    reasons: dict[str, list[str]] = {}
    for entry in found.left(training=False):
        text = _sized(entry["name"], entry["bytes"])
        reasons.setdefault(entry["reason"], []).append(text)
    for reason, names in reasons.items():
        yield "left out", f"{first_few(names, _NAMES)}: {reason}"


def _health(found: Inspection) -> Iterator[tuple[str, str]]:
    count = len(found.problems)
    yield from (("problem", problem.message) for problem in found.problems[:_PROBLEMS])
    if count > _PROBLEMS:
        yield "problem", f"and {count - _PROBLEMS:,} more, which --json lists"
    if count:
        yield "health", f"{count:,} problem{'s' * (count != 1)}, see above"
        return
    looked = "values looked at" if found.statistics else "values not looked at (--stats does)"
    yield "health", f"no problem found; {looked}"


def _rows(found: Inspection) -> Iterator[Row]:
    for name, tensor in found.tensors.items():
        shards = placement_of(tensor)
        what = f"{tensor.dtype:<8} {list(tensor.shape)}"
        others = [dtype for dtype in stored_dtypes(tensor) if dtype != tensor.dtype]
        what += f" of {' and '.join(others)}" if others else ""
        cut = describe_partition(tensor.shape, shards)
        yield Row(name, what, cut, _files(found, shards), tensor.nbytes)


def _files(found: Inspection, shards: Sequence[Shard]) -> str:
    files = list(dict.fromkeys(found.place(shard.file) for shard in shards))
    return first_few(files, _FILES)


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
    layers = f"{spec.num_layers} layer{'s' * (spec.num_layers != 1)}"
    text = f"{spec.family} ({spec.architecture}), {layers}, hidden size "
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


def _parallel_text(shown: Mapping[str, Any], experts: bool) -> str:
    return ", ".join(
        text.format(shown[key])
        for key, text in _PARALLEL.items()
        if shown.get(key) is not None and (experts or key not in ("ep", "etp"))
    )
