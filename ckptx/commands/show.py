"""``verify`` and ``plugins``: commands that only look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ckptx import manager
from ckptx.commands.options import output_options, show_result

_PATH = click.Path(exists=True, path_type=Path)


def verify_command() -> click.Command:
    """Return the command that compares two checkpoints."""

    def run(
        a: Path,
        b: Path,
        loader_a: str | None,
        loader_b: str | None,
        as_json: bool,
        quiet: bool,
        verbose: bool,
    ) -> None:
        from ckptx.verify import compare

        comparison = compare(a, b, loader_a=loader_a, loader_b=loader_b)
        show_result(comparison, as_json, quiet)
        if not comparison.equal:
            raise click.exceptions.Exit(1)

    return click.Command(
        "verify",
        callback=run,
        help="Compare two checkpoints, whatever their formats; exit 0 only if they are equal.",
        params=[
            click.Argument(["a"], type=_PATH),
            click.Argument(["b"], type=_PATH),
            click.Option(["--from-a", "loader_a"], help="Format of A.  [detected]"),
            click.Option(["--from-b", "loader_b"], help="Format of B.  [detected]"),
            *output_options(),
        ],
    )


def plugins_command() -> click.Command:
    """Return the command that lists plugins."""

    def run(names_only: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
        if names_only:
            found = [_row(entry, {}, "") for entry in manager.entries().values()]
        else:
            found = [_row(s.entry, s.capabilities, s.error) for s in manager.statuses()]
        if as_json:
            click.echo(json.dumps({"plugins": found}, indent=1))
        elif not quiet:
            for row in found:
                click.echo(_line(row))

    return click.Command(
        "plugins",
        callback=run,
        help="List plugins, where they come from, and what they can do.",
        params=[
            click.Option(["--names", "names_only"], is_flag=True, help="Import no plugin."),
            *output_options(),
        ],
    )


def _row(entry: manager.Entry, capabilities: Any, error: str) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "module": entry.point.value,
        "capabilities": dict(capabilities),
        "error": error,
    }


def _line(row: dict[str, Any]) -> str:
    head = f"{row['kind']:<7} {row['name']:<12} {row['distribution']} {row['version']}"
    if row["error"]:
        return f"{head}  error: {row['error']}"
    facts = (
        f"{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in row["capabilities"].items()
    )
    return f"{head}  {' '.join(facts)}".rstrip()
