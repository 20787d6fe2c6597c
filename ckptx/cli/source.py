"""``inspect`` and ``print-tensor``: commands on one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from ckptx.cli.options import show_result
from ckptx.cli.plugin_options import CheckpointCommand
from ckptx.conversion.options import option, switch
from ckptx.errors import CkptxError
from ckptx.registry.source import Source


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
