"""Commands that stand for another command of ckptx: show it, then run it in this process."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

import click

from ckptx.conversion.options import switch
from ckptx.text.shown import printable

PRINT_ONLY = switch("--print-only", "Print the command; do not run it.")


def remark(remarks: Iterable[str]) -> None:
    """Print what the user should know, on stderr."""
    for line in remarks:
        click.echo(printable(line), err=True)


def show(words: Sequence[str], *, err: bool = False) -> None:
    """Print a command as it may be pasted into a shell."""
    click.echo(shlex.join(["ckptx", *words]), err=err)


def run(words: Sequence[str]) -> None:
    """Run a command of ckptx.

    Raises:
        Exit: the command ended with an exit code that is not 0.
    """
    code = _group().main(list(words), "ckptx", standalone_mode=False)
    if isinstance(code, int) and code:
        raise click.exceptions.Exit(code)


def known(command: str) -> bool:
    """Return whether ckptx has a command."""
    return command in _group().list_commands(click.get_current_context())


def _group() -> click.Group:
    """Return ``ckptx`` itself, of which the command that runs now is one."""
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)  # both callers are its subcommands
    return root
