"""``from-script``: convert as a script of another project would, by its own arguments.

The commands are made from the tables in `ckptx.cli.scripts`. The command of ckptx that means the
same is printed first, on stderr.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import click

from ckptx.cli import equivalent
from ckptx.cli.scripts import named, scripts
from ckptx.cli.scripts.script import Flag, Script
from ckptx.conversion.options import option, overwrite_option, overwrite_spelled_out, switch
from ckptx.errors import PlanError

_HELP = (
    "Convert as a script of another project does, with its arguments: the command of ckptx that "
    "means the same is printed, and run. Options of that command may follow after --."
)


def from_script_command() -> click.Command:
    """Return the command that takes the arguments of other projects' scripts."""
    return _Scripts(
        "from-script",
        help=_HELP,
        short_help="Convert with the arguments of another project's script.",
        params=[
            switch("--list", "List the scripts.", is_eager=True, expose_value=False, callback=_list)
        ],
        subcommand_metavar="NAME [ARGUMENTS]... [-- OPTIONS]",
    )


_LAUNCHER = re.compile(r"python[\d.]*|bash|sh|accelerate")


def _pasted(args: list[str]) -> list[str]:
    """Return the arguments from the script's name on, where a whole command line is given.

    Examples:
        >>> _pasted(["python3", "-m", "verl.model_merger", "merge"])
        ['verl.model_merger', 'merge']
        >>> _pasted(["accelerate", "merge-weights", "A", "B"])
        ['merge-weights', 'A', 'B']
    """
    if not args or not _LAUNCHER.fullmatch(args[0].rpartition("/")[2]):
        return args
    return args[2:] if args[1:2] == ["-m"] else args[1:]


class _Scripts(click.Group):
    """The scripts by name; they are found when they are asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave out what starts the script."""
        return super().parse_args(ctx, _pasted(args))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all scripts."""
        return [script.name for script in scripts()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command for a script's name, path or module."""
        script = named(cmd_name)
        return _command(script) if script else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the script; say where the known ones are listed."""
        if args and not args[0].startswith("-") and named(args[0]) is None:
            close = get_close_matches(args[0], self.list_commands(ctx), 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            listed = "'ckptx from-script --list' shows those that are"
            raise click.UsageError(f"no script {args[0]!r} is known{meant}; {listed}", ctx)
        return super().resolve_command(ctx, args)


class _Parts(click.Group):
    """A script with sub-commands, one of which may be meant where none is named."""

    def __init__(self, name: str, unnamed: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.unnamed = unnamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the sub-command."""
        flags_only = bool(args) and args[0].startswith("-") and args[0] not in ctx.help_option_names
        return super().parse_args(
            ctx, [self.unnamed, *args] if self.unnamed and flags_only else args
        )


class _ScriptCommand(click.Command):
    """A script's flags, and after ``--`` options of the command of ckptx."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what follows ``--`` apart."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta["further"] = args[at + 1 :]
        lists = {word for p in self.params if getattr(p, "multiple", False) for word in p.opts}
        words = [_in_full(word, self.params) for word in args[:at]]
        return super().parse_args(ctx, list(_repeated(overwrite_spelled_out(words), lists)))


def _in_full(word: str, params: list[click.Parameter]) -> str:
    """Return a flag in full where its beginning is given, as argparse takes it.

    Dashes may stand for underscores, as in accelerate.

    Examples:
        >>> _in_full("--max-shard=1GB", [click.Option(["--max_shard_size"])])
        '--max_shard_size=1GB'
    """
    name, equals, value = word.partition("=")
    if not name.startswith("--") or any(name in param.opts for param in params):
        return word
    begin = name.replace("-", "_")
    found = {
        param.name: flag
        for param in params
        for flag in param.opts
        if flag.startswith("--") and flag.replace("-", "_").startswith(begin)
    }
    exact = [flag for flag in found.values() if flag.replace("-", "_") == begin]
    fits = exact or list(found.values())
    return f"{fits[0]}{equals}{value}" if len(fits) == 1 else word


def _repeated(args: list[str], lists: set[str]) -> Iterator[str]:
    """Yield arguments with the flag before each value, where scripts have it once before all.

    Examples:
        >>> list(_repeated(["--names", "a", "b", "--to", "c"], {"--names"}))
        ['--names', 'a', '--names', 'b', '--to', 'c']
    """
    flag = ""
    for before, word in zip(["", *args], args, strict=False):
        if word.startswith("-"):
            flag = word if word in lists else ""
        elif flag and before != flag:
            yield flag
        yield word


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    for script in scripts():
        click.echo(f"{script.name}  ({script.origin})")
        for part in script.parts or (script,):
            name = f"{part.name}: " * bool(script.parts)
            what = f"not here, {part.refused}" if part.refused else f"ckptx {part.command}"
            click.echo(f"    {name}{what}")
    ctx.exit()


def _command(script: Script) -> click.Command:
    if script.parts:
        parts = {part.name: _command(part) for part in script.parts}
        about = f"{script.origin}."
        return _Parts(script.name, script.unnamed, commands=parts, help=about, short_help=about)
    if script.refused:
        about = f"Not here: {script.refused}."
        return click.Command(
            script.name,
            callback=lambda rest: _refuse(script.name, script.refused),
            params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)],
            context_settings={"ignore_unknown_options": True},
            help=about,
            short_help=about,
        )
    own = [equivalent.PRINT_ONLY]
    if script.command in ("convert", "from-config"):
        own.append(overwrite_option())
    return _ScriptCommand(
        script.name,
        callback=lambda **values: _run(script, values),
        params=[*map(_parameter, script.flags), *own],
        help=f"As {script.origin}, by 'ckptx {script.command}'. Its options may follow after --.",
        short_help=f"{script.origin}.",
    )


def _parameter(one: Flag) -> click.Parameter:
    """Return a flag as click has it."""
    if one.positional:
        return click.Argument(
            list(one.spellings),
            nargs=-1 if one.many else 1,
            required=one.required,
            envvar=one.variable,
        )
    about = f"Not here: {one.refused}" if one.refused else one.help
    names = " ".join((*one.spellings, one.key))
    if one.switch:
        return switch(names, about)
    type_ = click.Choice(list(one.becomes)) if isinstance(one.becomes, dict) else str
    return option(names, type_, about, one.default, multiple=one.many, required=one.required)


def _refuse(name: str, reason: str) -> None:
    raise PlanError(f"{name}: {reason}")


def _run(script: Script, values: dict[str, Any]) -> None:
    further = click.get_current_context().meta["further"]
    for one in script.flags:
        if one.refused and values[one.key]:
            _refuse(one.spellings[0], one.refused)
    print_only = values.pop("print_only")
    replaced = values.pop("overwrite", False)
    more = [f"--overwrite{'=foreign' if replaced == 'foreign' else ''}"] * bool(replaced) + further
    first, *rest = script.lines(values)
    lines = [[*first, *more], *rest]
    quiet = bool({"--quiet", "-q"} & {*further})
    equivalent.remark(() if quiet else script.remarks(values))
    for line in lines:
        if print_only or not quiet:
            equivalent.show(line, err=not print_only)
        if print_only:
            continue
        if not equivalent.known(line[0]):
            _refuse(script.name, f"this release of ckptx has no command {line[0]!r}")
        equivalent.run(line)
