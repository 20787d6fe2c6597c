"""``verify`` and ``plugins``: commands that only look."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from ckptx.cli import running
from ckptx.cli.options import Checkpoint, output_options, show_result
from ckptx.registry import registry
from ckptx.text.wrapping import wrapped

_PATH = Checkpoint()


def verify_command() -> click.Command:
    """Return the command that compares two checkpoints, or one with its manifest."""

    def run(
        a: Path,
        b: Path | None,
        loader_a: str | None,
        loader_b: str | None,
        rtol: float,
        atol: float,
        ignore_dtype: bool,
        diagnosis: bool,
        against_manifest: Path | None,
        logits: bool,
        as_json: bool,
        quiet: bool,
        verbose: bool,
        **inputs: Any,
    ) -> None:
        if (b is None) == (against_manifest is None):
            raise click.UsageError("give two checkpoints, or one and --against-manifest FILE")
        result: Any
        running.check_inputs(logits and b is not None)
        if logits and b is not None:
            still = quiet or as_json or verbose
            result = running.compared_logits(a, b, loader_a, loader_b, inputs, still)
        elif against_manifest is not None:
            from ckptx.verification.manifest_check import check

            result = check(a, against_manifest)
        else:
            from ckptx.cli.progress import Bar
            from ckptx.protocol.progress import Silent
            from ckptx.registry.open import open_checkpoint
            from ckptx.verification.compare import compare
            from ckptx.verification.difference import Tolerance

            assert b is not None  # one of the two is given
            tolerance = Tolerance(rtol, atol, ignore_dtype)
            shown = sys.stderr.isatty() and not (quiet or as_json)
            bar = Bar() if shown else Silent()
            with open_checkpoint(a, loader_a) as left, open_checkpoint(b, loader_b) as right:
                result = compare(left, right, tolerance, diagnosis=diagnosis, progress=bar)
        show_result(result, as_json, quiet)
        if not result.equal:
            raise click.exceptions.Exit(1)

    number = click.FloatRange(0)
    manifest = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.Command(
        "verify",
        callback=run,
        help="Compare two checkpoints, whatever their formats; exit 0 only if they are equal. "
        "Where they differ, say which known mistake explains it.",
        short_help="Compare two checkpoints; say which mistake explains a difference.",
        params=[
            click.Argument(["a"], type=_PATH),
            click.Argument(["b"], type=_PATH, required=False),
            click.Option(["--from-a", "loader_a"], help="Format of A.  [detected]"),
            click.Option(["--from-b", "loader_b"], help="Format of B.  [detected]"),
            click.Option(
                ["--rtol"], type=number, default=0.0, help="Let values differ by so much of A's."
            ),
            click.Option(
                ["--atol"], type=number, default=0.0, help="Let values differ by so much."
            ),
            click.Option(
                ["--ignore-dtype"],
                is_flag=True,
                help="Equal values in different dtypes are equal, as with --rtol and --atol.",
            ),
            click.Option(
                ["--no-diagnosis", "diagnosis"],
                is_flag=True,
                flag_value=False,
                default=True,
                help="Do not look for the mistake that explains differences.",
            ),
            click.Option(
                ["--against-manifest"],
                type=manifest,
                help="Compare A with the digests in a ckptx-manifest.json, instead of with B.",
            ),
            *running.logits_options(),
            *output_options(),
        ],
    )


def plugins_command() -> click.Command:
    """Return the command that lists plugins."""

    def run(names_only: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
        if names_only:
            found = [_row(entry, {}, "") for entry in registry.entries().values()]
        else:
            found = [_row(s.entry, s.capabilities, s.error) for s in registry.statuses()]
        if as_json:
            click.echo(json.dumps({"plugins": found}, indent=1))
        elif not quiet:
            click.echo("\n".join(_lines(found, shutil.get_terminal_size().columns)))

    return click.Command(
        "plugins",
        callback=run,
        help="List plugins, where they come from, and what they can do.",
        params=[
            click.Option(["--names", "names_only"], is_flag=True, help="Import no plugin."),
            *output_options(),
        ],
    )


def _row(entry: registry.Entry, capabilities: Any, error: str) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "module": entry.point.value,
        "summary": entry.declared.summary if entry.declared else "",
        "capabilities": dict(capabilities),
        "error": error,
    }


def _lines(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    """Yield a paragraph for each kind of plugin; the names stand in one column."""
    column = max((len(row["name"]) for row in rows), default=0) + 4
    for kind, of_kind in groupby(rows, key=lambda row: row["kind"]):
        yield f"{kind}s"
        for row in of_kind:
            yield from wrapped(f"  {row['name']}", _said(row), width, column)


def _said(row: Mapping[str, Any]) -> str:
    if row["error"]:
        said = f"error: {row['error']}"
    else:
        told = (row["summary"], *map(_capability, row["capabilities"].items()))
        said = "; ".join(filter(None, told))
    if row["distribution"] == "ckptx" and not row["error"]:
        return said or "-"
    return f"{said}{' ' * bool(said)}({row['distribution']} {row['version']})"


def _capability(item: tuple[str, Any]) -> str:
    """Return what a plugin says of itself in words; empty if it says no to something."""
    key, value = item
    if isinstance(value, list | tuple):
        listed = ", ".join(map(str, value))
        return f"{key}: {listed}" * bool(listed)
    if isinstance(value, bool):
        return key * value
    return f"{key}: {value}"
