"""``convert``, ``plan``, ``modify``: commands whose options depend on the plugins that are chosen.

Beside these there are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptx.cli import runs
from ckptx.cli.options import (
    Place,
    argument,
    long_options,
    output_options,
    place_options,
    short_options,
    show_report,
    show_result,
)
from ckptx.cli.plugin_options import Chosen, PluginCommand, equal_options, scanned
from ckptx.conversion.options import MODIFY, Dtype, engine_options, megatron_options, option, switch
from ckptx.conversion.request import ConversionRequest, Edits, Other
from ckptx.errors import ConversionError, PluginError
from ckptx.registry import registry

if TYPE_CHECKING:
    from ckptx.conversion.report import Report
    from ckptx.verification.compare import Comparison


_VERIFY = "Then compare the target with the source, every value; exit 1 if they differ."


class ConversionCommand(PluginCommand):
    """A command with the options of a loader and a saver."""

    def __init__(
        self,
        name: str,
        summary: str,
        style: Literal["short", "long"],
        run: Callable[[ConversionRequest, dict[str, Any]], None],
        further: Sequence[click.Option] = (),
    ) -> None:
        self.run = run
        self.style = style
        self.base = (short_options if style == "short" else long_options)()
        self.megatron = megatron_options()
        self.engine = [*engine_options(), *further, *output_options()]
        params = [*self.base, *self.engine, *self.megatron]
        super().__init__(name, params=params, help=summary, short_help=summary)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Choose the plugins, then parse with their options."""
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if error.param is None or error.param.name != "saver":
                raise
            known = ", ".join(registry.names("saver"))
            text = f"say the format to write with {error.param.opts[0]}: {known}"
            raise click.UsageError(text, ctx) from None

    def invoke(self, ctx: click.Context) -> None:
        """Run the conversion that the options describe."""
        chosen: Chosen = ctx.meta["chosen"]
        loader, saver = chosen.name("loader"), chosen.name("saver")
        if loader is None or saver is None:
            raise click.UsageError(f"say the format of {ctx.params['load_dir']} with --from", ctx)
        fields = ConversionRequest.__dataclass_fields__
        engine = [one.name for one in (*self.engine, *self.megatron) if one.name in fields]
        both = self.module_arguments(ctx, loader=loader, saver=saver)
        job = ConversionRequest(
            loader=loader,
            saver=saver,
            source=ctx.params["load_dir"],
            target=ctx.params["save_dir"],
            loader_options={**chosen.values("loader", ctx.params), **both},
            saver_options={**chosen.values("saver", ctx.params), **both},
            **{str(name): ctx.params[str(name)] for name in engine},
            **self.changes(ctx),
        )
        self.run(job, ctx.params)

    def changes(self, ctx: click.Context) -> dict[str, Any]:
        """Return what else the request has."""
        return {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups: conversion, each plugin, engine, modules."""
        chosen: Chosen = ctx.meta.get("chosen") or Chosen()
        named = [param for param in self.base if isinstance(param, click.Option)]
        _section(ctx, formatter, "Conversion", named)  # click itself lists SRC and DST
        shown: list[click.Option] = []
        for owner, options in chosen.owners.items():
            new = [o for o in options if not any(equal_options(o, other) for other in shown)]
            shown += new
            _section(ctx, formatter, f"Options of {owner}", new)
        if chosen.modules:
            from ckptx.conversion import megatron_modules

            with formatter.section("Options of Megatron-style modules"):
                formatter.write(megatron_modules.option_help(chosen.modules) + "\n")
        help_option = self.get_help_option(ctx)
        _section(ctx, formatter, "Engine", [*self.engine, *([help_option] if help_option else [])])
        _section(ctx, formatter, "For Megatron-style modules", self.megatron)
        if not chosen.owners and any(param.name == "saver" for param in self.base):
            loaders, savers = (", ".join(registry.names(kind)) for kind in ("loader", "saver"))
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(
                    "Name a loader and a saver with --help to see their options. "
                    f"Known loaders: {loaders}; savers: {savers}."
                )

    def choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the plugins that ``args`` name, after as light a look as possible."""
        params, places = scanned(self.params, args)
        loader, saver, path = (params.get(k) for k in ("loader", "saver", "megatron_path"))
        if self.style == "short" and "megatron" in {str(n).lower() for n in (loader, saver)}:
            raise click.UsageError(
                "'megatron' is two formats: 'core' is Megatron Core, 'legacy' is of Megatron-LM's "
                "own models of 2019 to 2023"
            )
        source = params.get("load_dir") or next((p for p in places if p.exists()), None)
        if loader is None and saver is not None:
            options = self.saver(saver, path).options()  # a wrong name is the better error
            _, places = scanned([*self.params, *options], args)
            source = params.get("load_dir") or next((p for p in places if p.exists()), None)
            if source is not None and len(places) == 2 and not params.get("load_dir"):
                source = places[0]  # nothing but SRC and DST: an existing DST is not meant
            if source is not None and runs.are_meant(args) and not wants_help:
                source = runs.example(source, params)
            if source is not None and not (wants_help and not source.exists()):
                loader = registry.detect(source)
            elif "" in args and not wants_help:
                raise click.UsageError("a path is empty; is a variable of the shell not set?")
            elif places and not wants_help:
                loader = registry.detect(places[0])
        return Chosen(
            ("loader", registry.loader(loader, path, source) if loader else None),
            ("saver", self.saver(saver, path) if saver else None),
        )

    def saver(self, name: str, path: str | None) -> Any:
        """Return a saver; with Megatron's option names a module may have been meant.

        Raises:
            PluginError: there is none of this name.
        """
        try:
            return registry.saver(name, path)
        except PluginError as error:
            if self.style == "short" or not str(error).startswith("unknown"):
                raise
            text = f"{error}; no module saver_{name} is on the Python path either"
            raise PluginError(text) from None


class ModifyCommand(ConversionCommand):
    """A conversion whose saver is the one of the source's format."""

    def __init__(self) -> None:
        super().__init__(
            "modify", "Remove, cast or rename tensors of a checkpoint.", "short", _unless_dry
        )
        cast = "Give tensors another dtype. Repeatable; the last counts."
        rename = "Give tensors other names; a * stays as it is. Repeatable."
        self.base = [
            *place_options(),
            option(
                "--remove", str, "Leave out tensors. Repeatable.", multiple=True, metavar="GLOB"
            ),
            option("--cast", (str, Dtype()), cast, multiple=True, metavar="GLOB DTYPE"),
            option("--rename", (str, str), rename, multiple=True, metavar="FROM TO"),
            switch("--dry-run", "Show what would be; write nothing."),
        ]
        self.engine = [param for param in engine_options() if param.name in MODIFY]
        self.engine += output_options()
        self.megatron = []
        self.params = [*self.base, *self.engine]

    def changes(self, ctx: click.Context) -> dict[str, Any]:
        """Return the edits, as arguments of the request."""
        edits = Edits(*(ctx.params[name] for name in ("remove", "cast", "rename")))
        if not edits:
            raise click.UsageError("say what to change: --remove, --cast or --rename", ctx)
        return {"edits": edits}

    def choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the loader of the source and the saver of its format."""
        params, places = scanned(self.params, args)
        loader = params.get("loader")
        source = next((path for path in places if path.exists()), None)
        if loader is None and source is not None:
            loader = registry.detect(source)
        elif loader is None and places and not wants_help:
            loader = registry.detect(places[0])  # says that there is none
        if loader is None:
            return Chosen()
        from ckptx.conversion.edits import saver_for

        plugin = registry.loader(loader, source=source)
        return Chosen(("loader", plugin), ("saver", registry.saver(saver_for(plugin.name))))


class AverageCommand(ConversionCommand):
    """A conversion of the mean of several sources."""

    def __init__(self) -> None:
        super().__init__(
            "average",
            "Write the mean of several checkpoints of one model.",
            "short",
            _unless_dry,
            [switch("--verify", _VERIFY)],
        )
        path = Place(path_type=Path)
        about = "Checkpoints to read."
        weights = "What each weighs, as 0.5,0.3,0.2; together 1.  [all the same]"
        _, *rest = short_options()
        self.base = [
            argument("sources", metavar="SRC...", type=path, nargs=-1, required=True, help=about),
            *rest,
            option("--weights", str, weights, metavar="LIST"),
            switch("--dry-run", "Show what would be; write nothing."),
        ]
        self.params = [*self.base, *self.engine, *self.megatron]

    def invoke(self, ctx: click.Context) -> None:
        """Run the conversion of the first, which all others take part in."""
        ctx.params["load_dir"] = ctx.params["sources"][0]
        super().invoke(ctx)

    def changes(self, ctx: click.Context) -> dict[str, Any]:
        """Return what the mean is of, as an argument of the request."""
        from ckptx.conversion.keywords import mean_of

        chosen: Chosen = ctx.meta["chosen"]
        path, *others = ctx.params["sources"]
        first = Other(path, str(chosen.name("loader")), chosen.values("loader", ctx.params))
        named = first.loader if ctx.params["loader"] else None
        weights = ctx.params["weights"].split(",") if ctx.params["weights"] else ()
        return {"mean": mean_of(first, [(one, named) for one in others], weights)}


def convert_command(style: Literal["short", "long"] = "short") -> click.Command:
    """Return the command that converts, with short or Megatron's own option names."""
    further = [switch("--verify", _VERIFY), *runs.run_options()]
    return ConversionCommand("convert", "Convert a checkpoint.", style, convert, further)


def plan_command() -> click.Command:
    """Return the command that shows what a conversion would do."""
    return ConversionCommand(
        "plan", "Show what a conversion would do; write nothing.", "short", plan
    )


def average_command() -> click.Command:
    """Return the command that writes the mean of checkpoints."""
    return AverageCommand()


def modify_command() -> click.Command:
    """Return the command that changes a checkpoint and keeps its format."""
    return ModifyCommand()


def convert(job: ConversionRequest, params: dict[str, Any]) -> None:
    """Convert, and show what was done."""
    once, check = partial(_converted, params), partial(_difference, params)
    if runs.is_run(params):
        runs.convert_all(runs.Runs(job, params, once, check))
        return
    report, fault = once(job)
    show_report(report, params["as_json"], params["quiet"])
    if fault:
        raise ConversionError(fault)


def _converted(params: Mapping[str, Any], job: ConversionRequest) -> tuple[Report, str]:
    """Convert; return the report, and what `_difference` says."""
    from ckptx.cli import progress
    from ckptx.conversion import supervisor

    report = supervisor.convert(job, progress.choose(params["quiet"] or params["as_json"]))
    if not params.get("verify"):
        return report, ""
    found = _compared(params, job, Path(report.target))
    return replace(report, verification=found), _fault(found)


def _difference(params: Mapping[str, Any], job: ConversionRequest, target: Path) -> str:
    """Return that a target differs from its source, empty if nobody asked or it does not."""
    return _fault(_compared(params, job, target)) if params["verify"] else ""


def _compared(params: Mapping[str, Any], job: ConversionRequest, target: Path) -> Comparison:
    from ckptx.cli import progress
    from ckptx.verification.converted import compare_with_source

    return compare_with_source(job, target, progress.bar(params["quiet"] or params["as_json"]))


def _fault(found: Comparison) -> str:
    return "" if found.equal else f"{found.right}: differs from its source; the target stays there"


def plan(job: ConversionRequest, params: dict[str, Any]) -> None:
    """Show what would be done."""
    from ckptx.conversion import engine

    forecast = engine.forecast(job, tensors=params["as_json"])
    show_result(forecast, params["as_json"], params["quiet"])


def _unless_dry(job: ConversionRequest, params: dict[str, Any]) -> None:
    (plan if params["dry_run"] else convert)(job, params)


def _section(
    ctx: click.Context, out: click.HelpFormatter, title: str, params: Sequence[click.Parameter]
) -> None:
    rows = [row for param in params if (row := param.get_help_record(ctx)) is not None]
    if rows:
        with out.section(title):
            out.write_dl(rows)
