"""``inspect`` and ``print-tensor``: commands on one checkpoint, with its loader's options.

As with ``convert``, the command line is read twice: the first look finds the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click

from ckptx.cli.conversion import Chosen, scanned
from ckptx.cli.options import Checkpoint, output_options, show_result
from ckptx.errors import CkptxError
from ckptx.registry import registry

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


Run: TypeAlias = Callable[[Path, str, dict[str, Any], dict[str, Any]], None]
Failed: TypeAlias = Callable[[Path, str | None, CkptxError, dict[str, Any]], None]


class SourceCommand(click.Command):
    """A command whose first argument is a checkpoint; it grows the options of its loader.

    ``run`` is given the path, the loader's name, its options, and all parameters; ``failed`` the
    path, the loader's name as far as it is known, the error that is about to be told, and all
    parameters.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        params: Sequence[click.Parameter],
        run: Run,
        failed: Failed | None = None,
    ) -> None:
        self.run = run
        self.failed = failed
        base: list[click.Parameter] = [
            click.Argument(["path"], type=Checkpoint()),
            *params,
            click.Option(["--from", "--loader", "loader"], help="Its format.  [detected]"),
            click.Option(
                ["--hf-base"], type=_FOLDER, help="Hugging Face model to take the config from."
            ),
            *output_options(),
        ]
        short = f"{summary.partition(';')[0].rstrip('.')}."
        super().__init__(name, params=base, help=summary, short_help=short)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the loader, then parse with its options."""
        ctx.meta["chosen"] = chosen = self._choose(args)
        original = self.params
        self.params = [*original, *chosen.parameters(original)]
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params = original

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        chosen: Chosen = ctx.meta["chosen"]
        path: Path = ctx.params["path"]
        name = chosen.loader.name if chosen.loader else None
        try:
            if name is None:
                name = registry.detect(path)  # raises: it has found none before
            engine = {"hf_base": ctx.params["hf_base"], "dtype": None, "fill_from_base": ()}
            options = {**engine, **chosen.values("loader", ctx.params)}
            self.run(path, name, options, ctx.params)
        except CkptxError as error:
            if self.failed is not None:
                self.failed(path, name, error, ctx.params)
            raise

    def _choose(self, args: list[str]) -> Chosen:
        params, places = scanned(self.params, args)
        loader = params.get("loader")
        source = next((path for path in places if path.exists()), None)
        if loader is None and source is not None:
            try:
                loader = registry.detect(source)
            except CkptxError:
                loader = None  # `invoke` raises it again, where --json is known
        return Chosen(loader, None, None, source)


def inspect_command() -> click.Command:
    """Return the command that says what a checkpoint is."""

    def run(path: Path, loader: str, options: dict[str, Any], params: dict[str, Any]) -> None:
        from ckptx.cli import progress
        from ckptx.inspection.layers import parse_layers
        from ckptx.inspection.summary import Wanted, inspect
        from ckptx.inspection.text import render

        wanted = Wanted(
            names=params["names"],
            pattern=params["pattern"],
            layers=parse_layers(params["layers"]) if params["layers"] else None,
            tree=params["tree"],
            stats=params["stats"],
        )
        shown = progress.choose(params["quiet"] or params["as_json"])
        try:
            inspection = inspect(path, loader, options, wanted, shown)
        finally:
            shown.close()
        show_result(inspection, params["as_json"], params["quiet"], render)
        if not inspection.healthy:
            raise click.exceptions.Exit(1)

    def failed(path: Path, loader: str | None, error: CkptxError, params: dict[str, Any]) -> None:
        from ckptx.inspection.summary import Unreadable

        if params["as_json"]:
            show_result(Unreadable(str(path), loader, str(error)), True, False)

    return SourceCommand(
        "inspect",
        "Say what a checkpoint is, and whether it is whole; exit 1 if it is not.",
        [
            click.Option(["--tree"], is_flag=True, help="List the tensors; alike layers once."),
            click.Option(["--filter", "pattern"], metavar="GLOB", help="List tensors so named."),
            click.Option(["--layers"], metavar="LIST", help="List those of layers, as 0,4-7."),
            click.Option(
                ["--stats"],
                is_flag=True,
                help="Read the values: min, max, mean, std, and what is not finite.",
            ),
            click.Option(
                ["--names"],
                type=click.Choice(["model", "stored"]),
                default="model",
                show_default=True,
                help="Whole tensors by Hugging Face's names, or as the files hold them.",
            ),
        ],
        run,
        failed,
    )


def print_tensor_command() -> click.Command:
    """Return the command that shows the values of a tensor."""

    def run(path: Path, loader: str, options: dict[str, Any], params: dict[str, Any]) -> None:
        from ckptx.inspection.values import look_up

        values = look_up(path, loader, options, params["name"], params["part"], params["full"])
        show_result(values, params["as_json"], params["quiet"])

    return SourceCommand(
        "print-tensor",
        "Show the values of one tensor, or of a part of it.",
        [
            click.Argument(["name"]),
            click.Option(
                ["--slice", "part"], metavar="SLICE", help="A part, as numpy writes it: '0, :8'."
            ),
            click.Option(["--full"], is_flag=True, help="All values, not only the outer ones."),
        ],
        run,
    )
