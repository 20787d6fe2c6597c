"""What options of several commands share: paths, output, source and target."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from ckptx.conversion.options import option, switch
from ckptx.text.shown import printable


class Place(click.Path):
    """A path; not the empty one that a shell makes of a variable that is not set.

    An empty path would be the working directory, into which a conversion would write.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value):
            self.fail("the path is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


class Checkpoint(Place):
    """The path of a checkpoint that exists."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(exists=True, file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if str(value) and not Path(value).exists():
            from ckptx.registry.explain import why_absent

            self.fail(f"{value}: {why_absent(Path(value))}", param, ctx)
        return super().convert(value, param, ctx)


def show_result(result: Any, as_json: bool, quiet: bool) -> None:
    """Print a result that has ``to_json()`` and ``render(width)``."""
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=1))
    elif not quiet:
        click.echo(printable(result.render(shutil.get_terminal_size().columns)))


def show_report(report: Any, as_json: bool, quiet: bool) -> None:
    """Print the report of a target that is whole, which no fault of stdout changes."""
    try:
        if sys.stdout is None and not quiet:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        show_result(report, as_json, quiet)
    except OSError as error:
        if sys.stdout is not None:  # or Python tries again at its end, and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        line = f"the target is whole; its report cannot be shown: {error.strerror}"
        click.echo(f"note: {line}", err=True)


def output_options() -> list[click.Parameter]:
    """Return the options of every command."""
    return [
        switch("--json as_json", "Print the result as JSON."),
        switch("--quiet -q", "Print errors only."),
        switch("--verbose -v", "Show details, and tracebacks."),
    ]


def argument(name: str, help: str, **settings: Any) -> click.Argument:
    """Return a positional argument; click shows the help of one since 8.5."""
    try:
        return click.Argument([name], help=help, **settings)
    except TypeError:
        return click.Argument([name], **settings)


def place_options() -> list[click.Parameter]:
    """Return source, its format, and target."""
    path = Place(path_type=Path)
    return [
        argument("load_dir", metavar="SRC", type=path, help="Checkpoint to read."),
        argument("save_dir", metavar="DST", type=path, help="Where to write."),
        option("--from --loader loader", str, "Format of SRC.  [detected]"),
    ]


def short_options() -> list[click.Parameter]:
    """Return source, target and plugins as ``ckptx convert`` spells them."""
    return [*place_options(), option("--to --saver saver", str, "Format of DST.", required=True)]


def long_options() -> list[click.Parameter]:
    """Return source, target and plugins as Megatron's converter spells them."""
    path = Place(path_type=Path)
    return [
        option("--loader", str, "Format of the source.  [detected]"),
        option("--saver", str, "Format of the target.", required=True),
        option("--load-dir", path, "Checkpoint to read.", required=True),
        option("--save-dir", path, "Where to write.", required=True),
    ]
