"""``verify``, ``inspect``, ``print-tensor`` and ``plugins``: commands that only look."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptx.cli import running
from ckptx.cli.options import output_options, show_result
from ckptx.cli.plugin_options import CheckpointCommand
from ckptx.conversion.options import option, switch
from ckptx.errors import CkptxError
from ckptx.registry import registry
from ckptx.registry.source import Source
from ckptx.text.wrapping import wrapped

if TYPE_CHECKING:
    from ckptx.verification.compare import Comparison


def verify_command() -> click.Command:
    """Return the command that compares two checkpoints, or one with its manifest."""

    def run(sources: Sequence[Source], params: dict[str, Any]) -> None:
        manifest: Path | None = params["against_manifest"]
        if (len(sources) == 1) == (manifest is None):
            raise click.UsageError("give two checkpoints, or one and --against-manifest FILE")
        quiet, as_json = params["quiet"], params["as_json"]
        running.check_inputs(params["logits"] and manifest is None)
        result: Any
        if manifest is not None:
            from ckptx.verification.manifest_check import check

            result = check(sources[0].path, manifest)
        elif params["logits"]:
            result = running.compared_logits(sources[0], sources[1], params)
        else:
            result = _compared(sources[0], sources[1], params)
        show_result(result, as_json, quiet)
        if not result.equal:
            raise click.exceptions.Exit(1)

    number = click.FloatRange(0)
    cast = "Equal values in different dtypes are equal, as with --rtol and --atol."
    search = "Do not look for the mistake that explains differences."
    manifest = "Compare A with the digests in a ckptx-manifest.json, instead of with B."
    return CheckpointCommand(
        "verify",
        "Compare two checkpoints, whatever their formats; exit 0 only if they are equal. "
        "Where they differ, say which known mistake explains it. Options of a loader concern both "
        "checkpoints, or one: --a.hf-base DIR, --b.hf-base DIR.",
        [
            option(
                "--rtol", number, "Let values differ by so much of A's.", 0.0, show_default=False
            ),
            option("--atol", number, "Let values differ by so much.", 0.0, show_default=False),
            switch("--ignore-dtype", cast),
            switch("--no-diagnosis diagnosis", search, flag_value=False, default=True),
            option("--against-manifest", running.FILE, manifest),
            *running.logits_options(),
        ],
        run,
        short="Compare two checkpoints; say which mistake explains a difference.",
        two=True,
    )


def _compared(a: Source, b: Source, params: dict[str, Any]) -> Comparison:
    """Compare the weights of two checkpoints, behind a bar on a terminal."""
    from ckptx.cli.progress import bar
    from ckptx.verification.compare import compare
    from ckptx.verification.difference import Tolerance

    tolerance = Tolerance(params["rtol"], params["atol"], params["ignore_dtype"])
    shown = bar(params["quiet"] or params["as_json"])
    with a.open() as left, b.open() as right:
        return compare(left, right, tolerance, diagnosis=params["diagnosis"], progress=shown)


def inspect_command() -> click.Command:
    """Return the command that says what a checkpoint is."""

    def run(sources: Sequence[Source], params: dict[str, Any]) -> None:
        from ckptx.cli import progress
        from ckptx.inspection.layers import parse_layers
        from ckptx.inspection.summary import Wanted, inspect

        layers = parse_layers(params["layers"]) if params["layers"] else None
        given = {name: params[name] for name in ("names", "pattern", "tree", "stats")}
        wanted = Wanted(layers=layers, **given)
        shown = progress.choose(params["quiet"] or params["as_json"])
        try:
            with sources[0].open() as checkpoint:
                inspection = inspect(checkpoint, wanted, shown)
        finally:
            shown.close()
        show_result(inspection, params["as_json"], params["quiet"])
        if not inspection.healthy:
            raise click.exceptions.Exit(1)

    def failed(source: Source, error: CkptxError, params: dict[str, Any]) -> None:
        from ckptx.inspection.summary import unreadable

        if params["as_json"]:
            click.echo(json.dumps(unreadable(source.path, source.format, str(error)), indent=1))

    names = "Whole tensors by Hugging Face's names, or as the files hold them."
    return CheckpointCommand(
        "inspect",
        "Say what a checkpoint is, and whether it is whole; exit 1 if it is not.",
        [
            switch("--tree", "List the tensors; alike layers once."),
            option("--filter pattern", str, "List tensors so named.", metavar="GLOB"),
            option("--layers", str, "List those of layers, as 0,4-7.", metavar="LIST"),
            switch("--stats", "Read the values: min, max, mean, std, and what is not finite."),
            option("--names", click.Choice(["model", "stored"]), names, "model"),
        ],
        run,
        failed,
    )


def print_tensor_command() -> click.Command:
    """Return the command that shows the values of a tensor."""

    def run(sources: Sequence[Source], params: dict[str, Any]) -> None:
        from ckptx.inspection.values import look_up

        with sources[0].open() as checkpoint:
            values = look_up(checkpoint, params["name"], params["part"], params["full"])
        show_result(values, params["as_json"], params["quiet"])

    return CheckpointCommand(
        "print-tensor",
        "Show the values of one tensor, or of a part of it.",
        [
            click.Argument(["name"]),
            option("--slice part", str, "A part, as numpy writes it: '0, :8'.", metavar="SLICE"),
            switch("--full", "All values, not only the outer ones."),
        ],
        run,
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
        params=[switch("--names names_only", "Import no plugin."), *output_options()],
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
            yield from wrapped(f"  {row['name']}", _about(row), width, column)


def _about(row: Mapping[str, Any]) -> str:
    if row["error"]:
        about = f"error: {row['error']}"
    else:
        capabilities = map(_capability, row["capabilities"].items())
        about = "; ".join(filter(None, (row["summary"], *capabilities)))
    if row["distribution"] == "ckptx" and not row["error"]:
        return about or "-"
    return f"{about}{' ' * bool(about)}({row['distribution']} {row['version']})"


def _capability(item: tuple[str, Any]) -> str:
    """Return a capability in words; empty where the plugin lacks it."""
    key, value = item
    if isinstance(value, list | tuple):
        listed = ", ".join(map(str, value))
        return f"{key}: {listed}" * bool(listed)
    if isinstance(value, bool):
        return key * value
    return f"{key}: {value}"
