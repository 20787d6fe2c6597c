"""``modify``: a conversion to the format of the source, with tensors changed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptx.cli.conversion import ConversionCommand, convert, plan
from ckptx.cli.options import Place, argument, output_options
from ckptx.cli.plugin_options import Chosen, scanned
from ckptx.conversion.options import MODIFY, Dtype, engine_options, option, switch
from ckptx.conversion.request import ConversionRequest, Edits
from ckptx.registry import registry


class ModifyCommand(ConversionCommand):
    """A conversion whose saver is the one of the source's format."""

    def __init__(self) -> None:
        super().__init__(
            "modify", "Remove, cast or rename tensors of a checkpoint.", "short", _modify
        )
        path = Place(path_type=Path)
        cast = "Give tensors another dtype. Repeatable; the last counts."
        rename = "Give tensors other names; a * stays as it is. Repeatable."
        self.base = [
            argument("load_dir", metavar="SRC", type=path, help="Checkpoint to read."),
            argument("save_dir", metavar="DST", type=path, help="Where to write."),
            option("--from --loader loader", str, "Format of SRC.  [detected]"),
            option(
                "--remove", str, "Leave out tensors. Repeatable.", multiple=True, metavar="GLOB"
            ),
            option("--cast", (str, Dtype()), cast, multiple=True, metavar="GLOB DTYPE"),
            option("--rename", (str, str), rename, multiple=True, metavar="FROM TO"),
            switch("--dry-run", "Show what would be; write nothing."),
        ]
        self.engine = [param for param in engine_options() if param.name in MODIFY]
        self.engine += output_options()
        self.megatron = []
        self.params = [*self.base, *self.engine]

    def changes(self, ctx: click.Context) -> dict[str, Any]:
        """Return the edits, as arguments of the request."""
        edits = Edits(*(ctx.params[name] for name in ("remove", "cast", "rename")))
        if not edits:
            raise click.UsageError("say what to change: --remove, --cast or --rename", ctx)
        return {"edits": edits}

    def choose(self, args: list[str], wants_help: bool) -> Chosen:
        """Return the loader of the source and the saver of its format."""
        params, places = scanned(self.params, args)
        loader = params.get("loader")
        source = next((path for path in places if path.exists()), None)
        if loader is None and source is not None:
            loader = registry.detect(source)
        elif loader is None and places and not wants_help:
            loader = registry.detect(places[0])  # says that there is none
        if loader is None:
            return Chosen()
        from ckptx.conversion.edits import saver_for

        plugin = registry.loader(loader, source=source)
        return Chosen(("loader", plugin), ("saver", registry.saver(saver_for(plugin.name))))


def modify_command() -> click.Command:
    """Return the command that changes a checkpoint and keeps its format."""
    return ModifyCommand()


def _modify(job: ConversionRequest, params: dict[str, Any]) -> None:
    (plan if params["dry_run"] else convert)(job, params)
