"""The Python API: what ``import ckptx`` gives. See ``docs/python.md``.

A function does what the command of its name does, and takes its options as keywords, with
underscores. Nothing is printed and no global state of the caller is changed: signal handlers,
loggers, the working directory and ``sys.path`` stay as they are, in any thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from ckptx.errors import PlanError, PluginError, listing
from ckptx.registry import registry

if TYPE_CHECKING:
    from ckptx.conversion.report import Plan, Report
    from ckptx.inspection.checkpoint import Checkpoint
    from ckptx.inspection.summary import Inspection
    from ckptx.registry import open as registry_open
    from ckptx.verification.compare import Comparison

Source: TypeAlias = "str | os.PathLike[str] | Checkpoint"


class Format(NamedTuple):
    """A format, and what can be done with it."""

    name: str
    reads: bool
    writes: bool


def open(
    path: str | os.PathLike[str],
    *,
    from_: str | None = None,
    names: str = "model",
    **options: Any,
) -> Checkpoint:
    """Open a checkpoint of any format; only its metadata are read.

    Args:
        path: a file or a directory.
        from_: its format, detected unless given.
        names: ``"model"`` for whole tensors by Hugging Face's names, ``"stored"`` for what the
            files hold.
        options: the loader's options and ``hf_base``.

    Raises:
        CkptxError: it cannot be read.
    """
    from ckptx.inspection.checkpoint import Checkpoint

    return Checkpoint(_opened(path, from_, options), names)


def convert(
    source: Source,
    target: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    isolate: bool = False,
    **options: Any,
) -> Report:
    """Convert a checkpoint; the target appears whole, or not at all.

    Args:
        source: a path, or an open checkpoint.
        target: where to write.
        to: the format to write.
        from_: the format of the source, detected unless given.
        isolate: convert in processes of their own, whose death is an error and no more.
        options: those of ``ckptx convert``, loader, saver and engine. ``resume`` is off here.

    Raises:
        CkptxError: the first cause of a failure.
    """
    return cast("Report", _converted("convert", source, target, to, from_, isolate, options))


def plan(
    source: Source,
    target: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    isolate: bool = False,
    **options: Any,
) -> Plan:
    """Return what `convert` would do, proved; nothing is written. It takes the same arguments.

    Raises:
        CkptxError: the conversion is impossible.
    """
    return cast("Plan", _converted("plan", source, target, to, from_, isolate, options))


def modify(
    source: Source,
    target: str | os.PathLike[str],
    *,
    remove: str | Iterable[str] = (),
    cast: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    from_: str | None = None,
    isolate: bool = False,
    **options: Any,
) -> Report:
    """Write a checkpoint in its own format, with tensors removed, cast and renamed, in that order.

    Args:
        source: a path, or an open checkpoint.
        target: where to write.
        remove: globs of names.
        cast: globs to dtypes; the last that matches counts.
        rename: names to names, ``*`` for any text.
        from_: the format of the source, detected unless given.
        isolate: as for `convert`.
        options: those of ``ckptx modify``.

    Raises:
        CkptxError: the first cause of a failure.
    """
    from ckptx.conversion.keywords import edits

    changes = edits(remove, cast or {}, rename or {})
    report: Report = _converted(
        "convert", source, target, None, from_, isolate, options, edits=changes
    )
    return report


def average(
    sources: Sequence[Source],
    target: str | os.PathLike[str],
    *,
    to: str,
    weights: Sequence[float] = (),
    from_: str | None = None,
    isolate: bool = False,
    **options: Any,
) -> Report:
    """Write the mean of several checkpoints of one model, taken in float32.

    Args:
        sources: paths, or open checkpoints, of any formats.
        target: where to write.
        to: the format to write.
        weights: what each weighs, together 1; all the same unless given.
        from_: the format of the sources, detected for each unless given.
        isolate: as for `convert`.
        options: those of ``ckptx average``.

    Raises:
        CkptxError: the first cause of a failure, as sources that are not of one model.
    """
    if len(sources) < 2:
        raise PlanError("give at least two checkpoints to average")
    found = (_source(one, from_) for one in sources[1:])
    others = tuple((path.absolute(), format) for path, format in found)
    own: dict[str, Any] = {"others": others, "weights": tuple(weights)}
    report: Report = _converted("convert", sources[0], target, to, from_, isolate, options, **own)
    return report


def verify(
    a: Source,
    b: Source,
    *,
    from_a: str | None = None,
    from_b: str | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore_dtype: bool = False,
    diagnosis: bool = True,
    **options: Any,
) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor; ask for ``.equal``.

    Args:
        a: a path, or an open checkpoint.
        b: the other.
        from_a: the format of ``a``, detected unless given.
        from_b: the format of ``b``.
        rtol: how far values may differ, relative to those of ``a``.
        atol: how far they may differ.
        ignore_dtype: whether equal values in different dtypes are equal.
        diagnosis: whether to look for the mistake that explains differences.
        options: what `open` takes, after ``a_`` or ``b_``: ``a_hf_base``.

    Raises:
        CkptxError: one of them cannot be read, or they have no names in common.
    """
    from ckptx.verification.compare import compare
    from ckptx.verification.difference import Tolerance

    own: dict[str, dict[str, Any]] = {"a_": {}, "b_": {}, "": {}}
    for name, value in options.items():
        side = next(prefix for prefix in own if name.startswith(prefix))
        own[side][name.removeprefix(side)] = value
    if own[""]:
        raise PluginError(f"{listing(own[''])}: options of a checkpoint begin with a_ or b_")
    tolerance = Tolerance(rtol, atol, ignore_dtype)
    with _reading(a, from_a, own["a_"]) as left, _reading(b, from_b, own["b_"]) as right:
        return compare(left, right, tolerance, diagnosis=diagnosis)


def inspect(
    path: Source,
    *,
    from_: str | None = None,
    names: str = "model",
    filter: str | None = None,
    layers: str | None = None,
    stats: bool = False,
    **options: Any,
) -> Inspection:
    """Return what a checkpoint is, and whether it is whole.

    Args:
        path: a path, or an open checkpoint.
        from_: its format, detected unless given.
        names: as for `open`.
        filter: a glob of the names that are wanted.
        layers: the layers that are wanted, as ``"0,4-7"``.
        stats: whether to read the values, for minimum, maximum, mean and what is not finite.
        options: the loader's options and ``hf_base``.

    Raises:
        CkptxError: it cannot be read, or holds no tensor that was asked for.
    """
    from ckptx.inspection.layers import parse_layers
    from ckptx.inspection.summary import Wanted
    from ckptx.inspection.summary import inspect as inspect_checkpoint

    wanted = Wanted(names, filter, parse_layers(layers) if layers else None, stats=stats)
    with _reading(path, from_, options) as checkpoint:
        return inspect_checkpoint(checkpoint, wanted)


def formats() -> tuple[Format, ...]:
    """Return the formats that plugins read and write; imports none of them."""
    loaders, savers = registry.names("loader"), registry.names("saver")
    return tuple(
        Format(name, name in loaders, name in savers) for name in sorted({*loaders, *savers})
    )


def families() -> tuple[str, ...]:
    """Return the names of the model families that schemas know."""
    return tuple(sorted(registry.families()))


def _source(source: Source, format: str | None) -> tuple[Path, str | None]:
    """Return the path of a source, and its format as far as it is known."""
    from ckptx.conversion.keywords import place
    from ckptx.inspection.checkpoint import Checkpoint

    if isinstance(source, Checkpoint):
        return source.path, format or source.format
    return place(source), format


def _opened(
    source: Source, format: str | None, options: Mapping[str, Any]
) -> registry_open.Checkpoint:
    """Return a checkpoint that was opened with the loader's options and ``hf_base``."""
    from ckptx.conversion.keywords import bind
    from ckptx.conversion.options import engine_options
    from ckptx.registry.open import open_checkpoint

    place, known = _source(source, format)
    found = known or registry.detect(place)
    base = [option for option in engine_options() if option.name == "hf_base"]
    bound = bind([*base, *registry.loader(found).options()], options)
    unused = {"dtype": None, "fill_from_base": ()}
    return open_checkpoint(place, found, options={**unused, **bound})


@contextmanager
def _reading(
    source: Source, format: str | None, options: Mapping[str, Any]
) -> Iterator[registry_open.Checkpoint]:
    """Return a checkpoint that is open already, or open it for the while."""
    from ckptx.inspection.checkpoint import Checkpoint

    if isinstance(source, Checkpoint):
        yield source.opened
        return
    with _opened(source, format, options) as checkpoint:
        yield checkpoint


def _converted(
    action: Literal["convert", "plan"],
    source: Source,
    target: str | os.PathLike[str],
    to: str | None,
    from_: str | None,
    isolate: bool,
    options: Mapping[str, Any],
    **more: Any,
) -> Any:
    """Return the report of a conversion, or its plan."""
    from ckptx.conversion.keywords import Call, place

    path, format = _source(source, from_)
    call = Call(action, path.absolute(), place(target).absolute(), to, format, options, **more)
    if isolate or call.names_module():
        from ckptx.conversion import isolated

        return isolated.run(call)
    from ckptx.conversion import engine

    request = call.request()
    return engine.forecast(request) if action == "plan" else engine.convert(request)
