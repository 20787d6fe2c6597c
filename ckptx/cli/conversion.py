"""``convert`` and ``plan``: commands whose options depend on the plugins that are chosen.

The command line is read twice. The first look finds the loader and the saver (the format of the
source is detected if no loader is named); the second has exactly their options and the engine's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptx.cli.options import long_options, output_options, short_options, show_result
from ckptx.conversion.options import engine_options, megatron_options
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, PluginError
from ckptx.registry import registry

if TYPE_CHECKING:
    from ckptx.conversion.megatron_modules import Module

_ADAPTER = "ckptx.conversion.megatron_modules"


class Chosen:
    """The plugins of one command line, and their options."""

    def __init__(
        self,
        loader: str | None,
        saver: str | None,
        megatron_path: str | None,
        source: Path | None = None,
    ) -> None:
        self.loader = registry.loader(loader, megatron_path, source) if loader else None
        self.saver = registry.saver(saver, megatron_path) if saver else None
        plugins: tuple[object, ...] = (self.loader, self.saver)
        self.modules = _megatron_style(plugins)
        self.owners: dict[str, list[click.Option]] = {}
        for role, plugin in (("loader", self.loader), ("saver", self.saver)):
            if plugin is not None:
                self.owners[f"{role} {plugin.name}"] = plugin.options()

    def parameters(self, engine: Sequence[click.Parameter]) -> list[click.Option]:
        """Return the plugins' options, equal ones once.

        Raises:
            PluginError: one name is declared in different ways.
        """
        spellings = {spelling: ("ckptx", p) for p in engine for spelling in _spellings(p)}
        found: list[click.Option] = []
        for owner, options in self.owners.items():
            for option in options:
                for spelling in _spellings(option):
                    other, known = spellings.setdefault(spelling, (owner, option))
                    if known is not option and not _equal(known, option):
                        raise PluginError(
                            f"{option.opts[0]} is declared differently by {other} and by {owner}; "
                            "one of them must be renamed"
                        )
                if not any(_equal(option, known) for known in found):
                    found.append(option)
        return found

    def values(self, role: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters that belong to the plugin in ``role``."""
        options = next((o for owner, o in self.owners.items() if owner.startswith(role)), [])
        return {str(option.name): parameters[str(option.name)] for option in options}


def _megatron_style(plugins: Sequence[object]) -> list[Module]:
    """Return the Megatron-style modules; without one their adapter is not even imported."""
    if not any(type(plugin).__module__ == _ADAPTER for plugin in plugins):
        return []
    from ckptx.conversion.megatron_modules import Module

    return [plugin for plugin in plugins if isinstance(plugin, Module)]


class ConversionCommand(click.Command):
    """A command that grows the options of the plugins it is given."""

    def __init__(
        self,
        name: str,
        summary: str,
        style: Literal["short", "long"],
        run: Callable[[ConversionRequest, dict[str, Any]], None],
    ) -> None:
        self.run = run
        self.style = style
        self.base = (short_options if style == "short" else long_options)()
        self.megatron = megatron_options()
        self.engine = [*engine_options(), *output_options()]
        params = [*self.base, *self.engine, *self.megatron]
        super().__init__(name, params=params, help=summary, short_help=summary)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Choose the plugins, then parse with their options."""
        wants_help = any(arg in ctx.help_option_names for arg in args)
        ctx.meta["chosen"] = chosen = self._choose(args, wants_help)
        own = chosen.parameters(self.params)
        ctx.meta["own"] = own
        arguments = args
        if chosen.modules and not wants_help:
            spellings = frozenset(s for p in (*self.params, *own) for s in _spellings(p))
            from ckptx.conversion import megatron_modules

            ctx.meta["arguments"], arguments = megatron_modules.parse(
                chosen.modules, args, spellings
            )
        original = self.params
        self.params = [*original, *own]
        try:
            return super().parse_args(ctx, list(arguments))
        except click.NoSuchOption as error:
            raise _owned_elsewhere(error, chosen) from error
        except click.MissingParameter as error:
            if error.param is None or error.param.name != "saver":
                raise
            spelling = error.param.opts[0]
            known = ", ".join(registry.names("saver"))
            raise click.UsageError(
                f"say the format to write with {spelling}: {known}", ctx
            ) from None
        finally:
            self.params = original

    def invoke(self, ctx: click.Context) -> None:
        """Run the conversion that the options describe."""
        chosen: Chosen = ctx.meta["chosen"]
        if chosen.loader is None or chosen.saver is None:
            raise click.UsageError(f"say the format of {ctx.params['load_dir']} with --from", ctx)
        engine = (*engine_options(), *megatron_options())
        both = {}
        if chosen.modules:
            names = {"loader": chosen.loader.name, "saver": chosen.saver.name}
            both["arguments"] = {**ctx.params, **names, **ctx.meta.get("arguments", {})}
        job = ConversionRequest(
            loader=chosen.loader.name,
            saver=chosen.saver.name,
            source=ctx.params["load_dir"],
            target=ctx.params["save_dir"],
            loader_options={**chosen.values("loader", ctx.params), **both},
            saver_options={**chosen.values("saver", ctx.params), **both},
            **{str(one.name): ctx.params[str(one.name)] for one in engine},
        )
        self.run(job, ctx.params)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups: conversion, each plugin, engine, modules."""
        chosen: Chosen = ctx.meta.get("chosen") or Chosen(None, None, None)
        named = [param for param in self.base if isinstance(param, click.Option)]
        _section(ctx, formatter, "Conversion", named)  # click itself lists SRC and DST
        shown: list[click.Option] = []
        for owner, options in chosen.owners.items():
            new = [o for o in options if not any(_equal(o, other) for other in shown)]
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

    def _choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the plugins that ``args`` name, after as light a look as possible."""
        params, places = scanned(self.params, args)
        loader, saver, path = (params.get(k) for k in ("loader", "saver", "megatron_path"))
        source = params.get("load_dir") or next((p for p in places if p.exists()), None)
        if loader is None and saver is not None:
            options = registry.saver(saver, path).options()  # a wrong name is the better error
            _, places = scanned([*self.params, *options], args)
            source = params.get("load_dir") or next((p for p in places if p.exists()), None)
            if source is not None and len(places) == 2 and not params.get("load_dir"):
                source = places[0]  # nothing but SRC and DST: an existing DST is not meant
            if source is not None and not (wants_help and not source.exists()):
                loader = registry.detect(source)
            elif "" in args and not wants_help:
                raise click.UsageError("a path is empty; is a variable of the shell not set?")
            elif places and not wants_help:
                loader = registry.detect(places[0])
        return Chosen(loader, saver, path, source)


def scanned(
    params: Sequence[click.Parameter], args: Sequence[str]
) -> tuple[dict[str, Any], list[Path]]:
    """Return the known options of a command line, and what may be paths among the rest.

    Values of options that are not known yet stand there, too: take what exists.
    """
    scan = click.Command(
        "scan",
        params=[param for param in params if isinstance(param, click.Option)],
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    ctx = scan.make_context("scan", list(args), resilient_parsing=True)
    return ctx.params, [Path(arg) for arg in ctx.args if arg and not arg.startswith("-")]


def convert_command(style: Literal["short", "long"] = "short") -> click.Command:
    """Return the command that converts, with short or Megatron's own option names."""
    return ConversionCommand("convert", "Convert a checkpoint.", style, _convert)


def plan_command() -> click.Command:
    """Return the command that shows what a conversion would do."""
    return ConversionCommand(
        "plan", "Show what a conversion would do; write nothing.", "short", _plan
    )


def _convert(job: ConversionRequest, params: dict[str, Any]) -> None:
    from ckptx.cli import progress
    from ckptx.conversion import supervisor

    report = supervisor.convert(job, progress.choose(params["quiet"] or params["as_json"]))
    show_result(report, params["as_json"], params["quiet"])


def _plan(job: ConversionRequest, params: dict[str, Any]) -> None:
    from ckptx.conversion import engine

    forecast = engine.forecast(job, tensors=params["as_json"])
    show_result(forecast, params["as_json"], params["quiet"])


def _section(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    params: Sequence[click.Parameter],
) -> None:
    rows = [row for param in params if (row := param.get_help_record(ctx)) is not None]
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows)


def _spellings(param: click.Parameter) -> Iterator[str]:
    """Yield all that must be unique on one command line: the options, and the parameter's name."""
    if isinstance(param, click.Option):
        yield from (*param.opts, *param.secondary_opts)
    yield f"({param.name})"


def _equal(one: click.Parameter, other: click.Parameter) -> bool:
    """Return whether two declarations mean the same; the words of their help may differ."""
    first, second = one.to_info_dict(), other.to_info_dict()
    return all(first.get(key) == second.get(key) for key in {*first, *second} - {"help"})


def _owned_elsewhere(error: click.NoSuchOption, chosen: Chosen) -> click.UsageError:
    owners = []
    for entry in registry.entries().values():
        if entry.kind == "schema" or f"{entry.kind} {entry.name}" in chosen.owners:
            continue
        with contextlib.suppress(CkptxError):
            plugin = getattr(registry, entry.kind)(entry.name)
            if any(error.option_name in _spellings(option) for option in plugin.options()):
                owners.append(f"{entry.kind} {entry.name!r}")
    if not owners:
        return error
    return click.UsageError(
        f"{error.option_name} belongs to {' and '.join(owners)}, which is not chosen here "
        f"(chosen: {', '.join(chosen.owners) or 'nothing'})",
        error.ctx,
    )
