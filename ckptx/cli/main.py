"""The command line: ``ckptx``, and ``convert.py`` with Megatron's own option names.

Every error is one line on stderr that starts with ``error:``. Exit codes: 0 done, 1 failed (or, for
``verify``, different), 2 wrong usage, 128 + n stopped by signal n.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import click

from ckptx.errors import CkptxError
from ckptx.processes import torchrun
from ckptx.processes.interrupts import Interrupted
from ckptx.registry import registry
from ckptx.text.shown import printable
from ckptx.version import __version__

COMMANDS = {
    "convert": "ckptx.cli.conversion",
    "plan": "ckptx.cli.conversion",
    "from-config": "ckptx.cli.from_config",
    "from-script": "ckptx.cli.from_script",
    "inspect": "ckptx.cli.show",
    "print-tensor": "ckptx.cli.show",
    "verify": "ckptx.cli.show",
    "generate": "ckptx.cli.running",
    "modify": "ckptx.cli.conversion",
    "average": "ckptx.cli.conversion",
    "plugins": "ckptx.cli.show",
}
"""The module of every command, where ``<command>_command()`` returns it."""


class _Commands(click.Group):
    """Commands by name; the module of one is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command."""
        if cmd_name not in COMMANDS:
            return None
        module: Any = import_module(COMMANDS[cmd_name])
        made = getattr(module, f"{cmd_name.replace('-', '_')}_command")()
        return _with_examples(made, cmd_name)


def _with_examples(made: click.Command, name: str) -> click.Command:
    from ckptx.cli import examples

    made.epilog = examples.epilog(name)
    return made


def command() -> click.Group:
    """Return the ``ckptx`` command with its subcommands."""
    group = _Commands(
        "ckptx",
        help="Convert large-language-model checkpoints from any layout to any other.",
        context_settings=_SETTINGS,
    )
    return click.version_option(__version__, package_name="ckptx")(group)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``ckptx``."""
    _run(command(), args, "ckptx")


def convert(args: Sequence[str] | None = None) -> None:
    """Run a conversion with the options of Megatron's ``convert.py``."""
    from ckptx.cli.conversion import convert_command

    long = convert_command("long")
    long.context_settings = _SETTINGS
    _run(_with_examples(long, "convert.py"), args, "convert.py")


_LONGEST = 3000  # characters of an error
_PLAINLY = {
    "is not a valid integer range": "is not a whole number",
    "is not a valid float range": "is not a number",
}
"""Click's words for a wrong number, and plain ones."""
_SYSTEM = {
    errno.EMFILE: "raise the limit of open files of this shell (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""What to do about errors that the system has for any file."""
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _run(command: click.Command, args: Sequence[str] | None, name: str) -> None:
    args = list(sys.argv[1:] if args is None else args)
    # Of several ranks one does the work: one writer, one report.
    sys.exit(torchrun.once([name, *args], partial(_code, command, args, name)))


def _code(command: click.Command, args: list[str], name: str) -> int:
    """Run a command and report what goes wrong; return the exit code."""
    verbose = "--verbose" in args or "-v" in args
    quiet = "--quiet" in args or "-q" in args
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable("%(message)s"))
    registry.fallbacks[:] = [_module]
    try:
        code = command.main(args, name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        code = _error(error.format_message(), error.exit_code, verbose)
    except CkptxError as error:
        code = _error(str(error), 1, verbose)
    except Interrupted as error:
        code = _error(str(error), 128 + error.signum, verbose)
    except click.Abort:  # Ctrl-C where nothing was being written
        code = _error("stopped", 128 + signal.SIGINT, verbose)
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code = _error(_of_system(error) or _internal(error, verbose), 1, verbose)
    except Exception as error:  # a bug: still one line, and the whole story on request
        code = _error(_internal(error, verbose), 1, verbose)
    return code if isinstance(code, int) else 0


def _of_system(error: OSError) -> str:
    """Return what to do about an error that any file can meet, empty if it is another."""
    if error.errno == errno.ENOENT and error.filename is None:  # as getcwd says it
        return "the working directory was removed; change to one that exists"
    known = _SYSTEM.get(error.errno or 0)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; {known}" if known else ""


def _internal(error: Exception, verbose: bool) -> str:
    text = f"internal error: {type(error).__name__}: {error}"
    return text if verbose else f"{text} (--verbose shows where)"


def _module(role: registry.Role, name: str, megatron_path: str | None) -> Any:
    """Return a Megatron-style module as a plugin, None if there is none of this name."""
    from ckptx.conversion.megatron_modules import module_named

    return module_named(role, name, megatron_path)


def _error(message: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        click.echo(printable(traceback.format_exc().rstrip()), err=True)
    line = printable(" ".join(message.split())) or "stopped"
    for clicks, plain in _PLAINLY.items():
        line = line.replace(clicks, plain)
    if len(line) > _LONGEST:  # a name of a megabyte; advice comes last
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    click.echo(f"error: {line}", err=True)
    return code


class _Printable(logging.Formatter):
    """Writes records in which names of strangers do nothing to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
