"""Commands that grow the options of plugins: their command lines are read twice.

The first look finds the plugins (the format of a checkpoint is detected if no loader is named); the
second has exactly their options, beside those of the command.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import click
from click.core import ParameterSource

from ckptx.cli.options import Checkpoint, output_options
from ckptx.conversion.options import FOLDER, megatron_options, option, overwrite_spelled_out
from ckptx.errors import CkptxError, PluginError
from ckptx.registry import registry
from ckptx.registry.source import Source

if TYPE_CHECKING:
    from ckptx.conversion.megatron_modules import Module


class Use(NamedTuple):
    """A plugin on a command line: a ``role``, and the letter of the checkpoint if there are two."""

    role: registry.Role
    side: str
    plugin: Any
    options: Sequence[click.Option]

    @property
    def label(self) -> str:
        """The plugin, for people: ``"loader hf"``."""
        return f"{self.role} {self.plugin.name}"


class Chosen:
    """The plugins of one command line, and their options."""

    def __init__(
        self, *plugins: tuple[registry.Role, Any], sides: Sequence[str] = ("", "")
    ) -> None:
        self.uses = [
            Use(role, side, plugin, plugin.options())
            for (role, plugin), side in zip(plugins, sides, strict=False)
            if plugin is not None
        ]
        # What no plugin declares is a Megatron-style module.
        self.modules: list[Module] = [
            use.plugin for use in self.uses if use.plugin.name not in registry.names(use.role)
        ]

    def name(self, role: str, side: str = "") -> str | None:
        """Return the name of the plugin in a role."""
        return next((u.plugin.name for u in self.uses if (u.role, u.side) == (role, side)), None)

    @property
    def owners(self) -> dict[str, Sequence[click.Option]]:
        """The options of every plugin, by its label."""
        return {use.label: use.options for use in self.uses}

    def parameters(self, known: Sequence[click.Parameter]) -> list[click.Option]:
        """Return the plugins' options beside the ``known`` ones, equal ones once.

        The loaders of two checkpoints need not agree: each option is there for one side, too, as
        ``--a.container``, and one that two loaders declare differently only so.

        Raises:
            PluginError: a loader and a saver declare one name in different ways.
        """
        spellings = {spelling: ("ckptx", p) for p in known for spelling in _spellings(p)}
        found: list[click.Option] = []
        for use in self.uses:
            for own in use.options:
                clash = ""
                for spelling in _spellings(own):
                    other, first = spellings.setdefault(spelling, (use.label, own))
                    if first is not own and not equal_options(first, own):
                        clash = other
                if clash and not use.side:
                    raise PluginError(
                        f"{own.opts[0]} is declared differently by {clash} and by {use.label}; "
                        "one of them must be renamed"
                    )
                if not clash and not any(equal_options(own, one) for one in found):
                    found.append(own)
        return found

    def values(self, role: str, parameters: Mapping[str, Any], side: str = "") -> dict[str, Any]:
        """Return the parameters that belong to the plugin in a role."""
        options = next((u.options for u in self.uses if (u.role, u.side) == (role, side)), ())
        return {str(option.name): parameters[str(option.name)] for option in options}


class PluginCommand(click.Command):
    """A command that grows the options of the plugins that it is given."""

    def choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the plugins that ``args`` name, after as light a look as possible."""
        raise NotImplementedError

    def further(self, chosen: Chosen) -> list[click.Option]:
        """Return the options of the plugins, which are parsed with those of the command."""
        return chosen.parameters(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Choose the plugins, then parse with their options."""
        wants_help = any(arg in ctx.help_option_names for arg in args)
        args = overwrite_spelled_out(args)
        ctx.meta["chosen"] = chosen = self.choose(args, wants_help)
        own = self.further(chosen)
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
        finally:
            self.params = original

    def module_arguments(self, ctx: click.Context, **names: Any) -> dict[str, Any]:
        """Return what Megatron-style modules are given as their ``args``, if there are any."""
        if not ctx.meta["chosen"].modules:
            return {}
        return {"arguments": {**ctx.params, **names, **ctx.meta.get("arguments", {})}}


Run: TypeAlias = Callable[[Sequence[Source], dict[str, Any]], None]
Failed: TypeAlias = Callable[[Source, CkptxError, dict[str, Any]], None]


class CheckpointCommand(PluginCommand):
    """A command on one checkpoint or on two, with all options of their loaders.

    ``run`` is given the checkpoints and all parameters; ``failed`` the first of them, the error
    and all parameters, before the error is reported. Two checkpoints have the letters ``a`` and
    ``b``; the second may be left out.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        params: Sequence[click.Parameter],
        run: Run,
        failed: Failed | None = None,
        short: str = "",
        two: bool = False,
    ) -> None:
        self.run, self.failed = run, failed
        self.sides = ("a", "b") if two else ("",)
        base = "Hugging Face model to take the config from."
        self.reading = option("--hf-base", FOLDER, base)
        decoded = "Where to decode what lies compressed.  [directory for temporary files]"
        spool = option("--spool", FOLDER, decoded)
        common = [*map(_argument, self.sides), *map(_format_option, self.sides)]
        modules = megatron_options(hidden=True)
        every = [*common, *params, self.reading, spool, *output_options(), *modules]
        short = short or f"{summary.partition(';')[0].rstrip('.')}."
        super().__init__(name, params=every, help=summary, short_help=short)

    def choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the loaders of the checkpoints; an error is reported later."""
        params, places = scanned(self.params, args)
        paths = [path for path in places if path.exists()]
        found: list[tuple[registry.Role, Any]] = []
        for side, path in zip(self.sides, [*paths, None, None], strict=False):
            loader = params.get(f"loader_{side}" if side else "loader")
            plugin = None
            if loader is not None or path is not None:
                with contextlib.suppress(*(() if loader else (CkptxError,))):
                    loader = loader or registry.detect(path or Path())
                    plugin = registry.loader(loader, params.get("megatron_path"), path)
            found.append(("loader", plugin))
        return Chosen(*found, sides=self.sides)

    def further(self, chosen: Chosen) -> list[click.Option]:
        """Return the loaders' options; of two loaders, each for its side alone, too."""
        plain = super().further(chosen)
        of_sides = [
            _for_side(use.side, option)
            for use in chosen.uses
            if use.side
            for option in (self.reading, *use.options)
        ]
        return [*(_optional(one) if of_sides else one for one in plain), *of_sides]

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        sources = [
            self._source(ctx, side) for side in self.sides if ctx.params[side or "path"] is not None
        ]
        try:
            self.run(sources, ctx.params)
        except CkptxError as error:
            if self.failed is not None:
                self.failed(sources[0], error, ctx.params)
            raise

    def _source(self, ctx: click.Context, side: str) -> Source:
        chosen: Chosen = ctx.meta["chosen"]
        options = [o for use in chosen.uses if use.side == side for o in use.options]
        loader = chosen.name("loader", side)
        return Source(
            ctx.params[side or "path"],
            loader,
            {str(option.name): _value(ctx, side, option) for option in options}
            | self.module_arguments(ctx, loader=loader),
            _value(ctx, side, self.reading),
            ctx.params["spool"],
            {name: ctx.params[name] for name in ("checking", "megatron_path", "model_type")},
        )


def _argument(side: str) -> click.Parameter:
    return click.Argument([side or "path"], type=Checkpoint(), required=side != "b")


def _format_option(side: str) -> click.Parameter:
    names = f"--from-{side} loader_{side}" if side else "--from --loader loader"
    about = f"Format of {side.upper()}" if side else "Its format"
    return option(names, str, f"{about}.  [detected]")


def _for_side(side: str, option: click.Option) -> click.Option:
    """Return an option as it is spelled for one of two checkpoints: ``--a.hf-base``."""
    one = _optional(option)
    one.name = f"{side}_{option.name}"
    one.opts, one.secondary_opts = (
        [f"--{side}.{spelling[2:]}" for spelling in spellings if spelling.startswith("--")]
        for spellings in (option.opts, option.secondary_opts)
    )
    one.hidden = True
    return one


def _optional(option: click.Option) -> click.Option:
    one = copy.copy(option)
    one.required = False
    return one


def _value(ctx: click.Context, side: str, option: click.Option) -> Any:
    """Return the value of an option for a side: one given for the side wins over one for both.

    Raises:
        click.MissingParameter: it is required and not given.
    """
    name = str(option.name)
    alone = f"{side}_{name}"
    if side and ctx.get_parameter_source(alone) == ParameterSource.COMMANDLINE:
        return ctx.params[alone]
    value = ctx.params[name] if name in ctx.params else option.get_default(ctx)
    if value is None and option.required:
        raise click.MissingParameter(ctx=ctx, param=_for_side(side, option) if side else option)
    return value


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


def _spellings(param: click.Parameter) -> Iterator[str]:
    """Yield all that must be unique on one command line: the options, and the parameter's name."""
    if isinstance(param, click.Option):
        yield from (*param.opts, *param.secondary_opts)
    yield f"({param.name})"


def equal_options(one: click.Parameter, other: click.Parameter) -> bool:
    """Return whether two declarations mean the same; the words of their help may differ."""
    first, second = one.to_info_dict(), other.to_info_dict()
    return all(first.get(key) == second.get(key) for key in {*first, *second} - {"help"})


def _owned_elsewhere(error: click.NoSuchOption, chosen: Chosen) -> click.UsageError:
    owners = []
    for entry in registry.entries().values():
        if entry.kind not in ("loader", "saver") or f"{entry.kind} {entry.name}" in chosen.owners:
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
