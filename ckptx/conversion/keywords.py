"""What a caller of the API asks for, as plain values, and the request that it means.

Keywords are the command line's options with underscores: ``tp=2`` and
``target_tensor_parallel_size=2`` are ``--tp 2``. Values take the road that words of a command line
take, through click's types.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click

from ckptx.conversion import megatron_modules
from ckptx.conversion.edits import saver_for
from ckptx.conversion.options import MODIFY, Dtype, engine_options, megatron_options
from ckptx.conversion.request import ConversionRequest, Edits, Mean, Other
from ckptx.errors import PlanError, PluginError
from ckptx.registry import registry
from ckptx.registry.registry import Role


@dataclass(frozen=True, slots=True)
class Call:
    """A call of ``ckptx.convert``, ``plan`` or ``modify``, that travels to another process."""

    action: Literal["convert", "plan"]
    source: Path
    target: Path
    saver: str | None
    """None where the format stays."""
    loader: str | None
    """None where it is detected."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    edits: Edits | None = None
    others: Sequence[tuple[Path, str | None]] = ()
    """What the mean of the source is taken with, if anything."""
    weights: Sequence[float] = ()

    def names_module(self) -> bool:
        """Return whether a Megatron-style module takes part; none is imported."""
        path = self.keywords.get("megatron_path")
        named: tuple[tuple[Role, str | None], ...]
        named = ("loader", self.loader), ("saver", self.saver)
        return any(name and megatron_modules.is_module(role, name, path) for role, name in named)

    def request(self) -> ConversionRequest:
        """Return the request of the conversion.

        Raises:
            CkptxError: a keyword or a value is not known, or the format of the source.
        """
        loader = self.loader or registry.detect(self.source)
        saver = self.saver or saver_for(registry.canonical(loader))
        engine = [*engine_options(), *megatron_options()]
        if self.edits is not None:
            engine = [option for option in engine if option.name in MODIFY]
        path = self.keywords.get("megatron_path")
        plugins = (registry.loader(loader, path), registry.saver(saver, path))
        own = [plugin.options() for plugin in plugins]
        modules = [one for one in plugins if isinstance(one, megatron_modules.Module)]
        declared = [*engine, *own[0], *own[1]]
        values, arguments = _with_modules(modules, declared, self.keywords)
        request = ConversionRequest(
            loader=loader,
            saver=saver,
            source=self.source,
            target=self.target,
            edits=self.edits,
            **{str(option.name): values[str(option.name)] for option in engine},
        )
        if not {"resume", "no_resume"} & self.keywords.keys():
            request = replace(request, resume=False)  # a function leaves nothing behind
        both: dict[str, Any] = {}
        if modules:
            named = {"loader": plugins[0].name, "saver": plugins[1].name}
            places = {"load_dir": request.source, "save_dir": request.target}
            both["arguments"] = {**values, **places, **named, **arguments}
        options = [{str(one.name): values[str(one.name)] for one in each} for each in own]
        if self.others:
            first = Other(self.source, loader, options[0])
            request = replace(request, mean=mean_of(first, self.others, self.weights))
        return replace(request, loader_options=options[0] | both, saver_options=options[1] | both)


def place(path: str | os.PathLike[str]) -> Path:
    """Return a path of the caller; not the empty one, which would be the working directory.

    Raises:
        PlanError: it is empty.
    """
    if not os.fspath(path):
        raise PlanError("the path is empty")
    return Path(path).expanduser() if str(path).startswith("~") else Path(path)


def edits(remove: str | Iterable[str], cast: Mapping[str, str], rename: Mapping[str, str]) -> Edits:
    """Return the changes that a caller asks for.

    Raises:
        PlanError: there is none, or a dtype is not known.
    """
    globs = (remove,) if isinstance(remove, str) else tuple(remove)
    try:
        dtypes = tuple((glob, Dtype()(value)) for glob, value in cast.items())
    except click.UsageError as error:
        raise PlanError(f"cast: {error.format_message()}") from error
    changes = Edits(globs, dtypes, tuple(rename.items()))
    if not changes:
        raise PlanError("say what to change: remove, cast or rename")
    return changes


def mean_of(
    first: Other, others: Sequence[tuple[Path, str | None]], weights: Sequence[str | float] = ()
) -> Mean:
    """Return the mean that a caller asks for, of the ``first`` source and others.

    Each of the others has its format, None where it is detected. What is of the format of the
    first is read with the same options.

    Raises:
        CkptxError: a format is not known, or the weights do not fit.
    """
    if not others:
        raise PlanError("give at least two checkpoints to average, and a target")
    absolute = [os.path.realpath(path) for path in (first.path, *(path for path, _ in others))]
    if len(set(absolute)) < len(absolute):
        raise PlanError("a checkpoint is given twice; let it weigh more by its weight instead")
    try:
        numbers = tuple(map(float, weights))
    except ValueError as error:
        raise PlanError(f"weights: {error}; expected numbers, as 0.5,0.3,0.2") from error
    if numbers and (len(numbers) != len(absolute) or not math.isclose(sum(numbers), 1)):
        raise PlanError(
            f"weights: {len(numbers)}, together {sum(numbers):g}; expected one for each of the "
            f"{len(absolute)} checkpoints, together 1"
        )
    found = []
    for path, named in others:
        format = named or registry.detect(path)
        same = registry.canonical(format) == registry.canonical(first.loader)
        own = first.options if same else bind(registry.loader(format).options(), {})
        found.append(Other(path.absolute(), format, own))
    return Mean(tuple(found), numbers)


def bind(options: Sequence[click.Option], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every option by its name, defaults included.

    Raises:
        PluginError: a keyword is none of the options', or one is given twice.
        PlanError: a value is not of the option's type.
    """
    spellings = {spelling: option for option in options for spelling in _spellings(option)}
    given: dict[str, tuple[str, Any]] = {}
    for keyword, value in keywords.items():
        option = spellings.get(keyword)
        if option is None:
            near = difflib.get_close_matches(keyword, spellings, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise PluginError(f"{keyword!r} is no option here{meant}")
        name = str(option.name)
        if name in given:
            raise PluginError(f"{given[name][0]!r} and {keyword!r} are one option; give it once")
        given[name] = keyword, _raw(option, keyword, value)
    ctx = click.Context(click.Command("ckptx"))
    for option in dict.fromkeys(options):
        name = str(option.name)
        keyword, value = given.get(name, ("", None))
        try:
            option.handle_parse_result(ctx, {name: value} if value is not None else {}, [])
        except click.UsageError as error:
            raise PlanError(f"{keyword or name}: {error.format_message()}") from error
    unset = getattr(click.core, "UNSET", None)  # what click 8.3 and later say for None
    return {name: None if value is unset else value for name, value in ctx.params.items()}


def _spellings(option: click.Option) -> Iterator[str]:
    for spelling in (str(option.name), *option.opts, *option.secondary_opts):
        yield spelling.lstrip("-").replace("-", "_")


def _raw(option: click.Option, keyword: str, value: Any) -> Any:
    """Return a value as click's parser would hand it on."""
    if value is None:
        return None
    if option.is_flag:
        negated = {word.lstrip("-").replace("-", "_") for word in option.secondary_opts}
        if option.flag_value is False and keyword != option.name:
            negated.add(keyword)
        return not value if keyword in negated else value
    if option.multiple:
        if isinstance(value, str | os.PathLike):
            return [value]
        return list(value.items() if isinstance(value, Mapping) else value)
    return value


def _with_modules(
    modules: Sequence[megatron_modules.Module],
    declared: Sequence[click.Option],
    keywords: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of our options and those of Megatron-style modules, which are argparse's.

    Raises:
        CkptxError: a keyword or value is not known.
    """
    if not modules:
        return bind(declared, keywords), {}
    ours = {spelling for option in declared for spelling in _spellings(option)}
    words: list[str] = []
    for keyword, value in keywords.items():
        if value is None or value is False:
            continue
        words.append(f"--{keyword.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list | tuple) else [value])
    shared = frozenset(f"--{spelling.replace('_', '-')}" for spelling in ours)
    try:
        arguments, rest = megatron_modules.parse(modules, words, shared)
    except click.UsageError as error:
        raise PlanError(error.format_message()) from error
    left = {word[2:].replace("-", "_") for word in rest if word.startswith("--")}
    return bind(declared, {name: value for name, value in keywords.items() if name in left}), (
        arguments
    )
