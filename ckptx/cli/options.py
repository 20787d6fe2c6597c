"""The options of the engine, which every conversion has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    **{name: name for name in ("bfloat16", "float16", "float32")},
}


class Size(click.ParamType[Any]):
    """A number of bytes: ``512M``, ``2GiB``, ``1.5g``."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; write 512M or 2G", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


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


class Dtype(click.ParamType[Any]):
    """A dtype by its torch name or a short one."""

    name = "dtype"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | None:
        """Return the torch name."""
        if value not in DTYPES:
            self.fail(f"{value!r} is not one of {', '.join(DTYPES)}", param, ctx)
        return DTYPES[value]


def show_result(
    result: Any,
    as_json: bool,
    quiet: bool,
    render: Callable[[Any, int], str] | None = None,
) -> None:
    """Print a result that has ``to_json()``, and ``render(width)`` unless that is given."""
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=1))
    elif not quiet:
        width = shutil.get_terminal_size().columns
        click.echo(printable(render(result, width) if render else result.render(width)))


def printable(text: str) -> str:
    r"""Return a text that does nothing to a terminal: names of tensors come from strangers.

    Examples:
        >>> print(printable("a\x1b[31m\nb"))
        a\x1b[31m
        b
    """
    return "\n".join(
        line
        if line.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        for line in text.split("\n")
    )


def output_options() -> list[click.Parameter]:
    """Return the options of every command."""
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print errors only."),
        click.Option(["--verbose", "-v"], is_flag=True, help="Show details, and tracebacks."),
    ]


def engine_options() -> list[click.Parameter]:
    """Return the options of a conversion that belong to no plugin."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    return [
        click.Option(["--dtype"], type=Dtype(), help="Convert weights to this dtype.  [as stored]"),
        click.Option(["--overwrite"], is_flag=True, help="Replace an existing target."),
        click.Option(
            ["--hf-base"], type=folder, help="Hugging Face model to take config and tokenizer from."
        ),
        click.Option(
            ["--fill-from-base"],
            multiple=True,
            metavar="GLOB",
            help="Take tensors of this name from --hf-base if the source lacks them. Repeatable.",
        ),
        click.Option(
            ["--max-memory"],
            type=Size(),
            default="512M",
            show_default=True,
            help="Memory of the whole conversion.",
        ),
        click.Option(
            ["--threads"],
            type=click.IntRange(0, 1024),
            default=0,
            help="Threads that move bytes.  [as many as help]",
        ),
        click.Option(
            ["--digest"],
            type=click.Choice(["xxh3_128", "sha256"]),
            default="xxh3_128",
            show_default=True,
            help="Digest of the manifest's tensors.",
        ),
        click.Option(
            ["--check-replicas"],
            type=click.Choice(["all", "sample", "none"]),
            default="sample",
            show_default=True,
            help="How much of a tensor's further copies is compared.",
        ),
        click.Option(
            ["--resume/--no-resume"],
            default=True,
            help="Continue an interrupted run of the same conversion; or start over, and leave "
            "nothing if interrupted.  [default: resume]",
        ),
        click.Option(
            ["--journal-every"],
            type=Size(),
            default="256M",
            show_default=True,
            help="How much an interrupted run may have to write again.",
        ),
        click.Option(
            ["--max-queue-size"],
            type=click.IntRange(1),
            default=50,
            show_default=True,
            help="Messages that may wait between the two processes.",
        ),
        *output_options(),
    ]


def megatron_options() -> list[click.Parameter]:
    """Return the options that concern Megatron-style modules only."""
    return [
        click.Option(
            ["--model-type"],
            type=click.Choice(["GPT", "BERT"]),
            default="GPT",
            show_default=True,
            help="Type of the model.",
        ),
        click.Option(
            ["--no-checking", "checking"],
            is_flag=True,
            flag_value=False,
            default=True,
            help="Let modules send messages in any order.",
        ),
        click.Option(
            ["--megatron-path"], metavar="DIR", help="Megatron-LM checkout that modules import."
        ),
    ]


def short_options() -> list[click.Parameter]:
    """Return source, target and plugins as ``ckptx convert`` spells them."""
    path = Place(path_type=Path)
    return [
        click.Argument(["load_dir"], metavar="SRC", type=path, help="Checkpoint to read."),
        click.Argument(["save_dir"], metavar="DST", type=path, help="Where to write."),
        click.Option(["--from", "--loader", "loader"], help="Format of SRC.  [detected]"),
        click.Option(["--to", "--saver", "saver"], required=True, help="Format of DST."),
    ]


def long_options() -> list[click.Parameter]:
    """Return source, target and plugins as Megatron's converter spells them."""
    path = Place(path_type=Path)
    return [
        click.Option(["--loader"], help="Format of the source.  [detected]"),
        click.Option(["--saver"], required=True, help="Format of the target."),
        click.Option(["--load-dir"], type=path, required=True, help="Checkpoint to read."),
        click.Option(["--save-dir"], type=path, required=True, help="Where to write."),
    ]
