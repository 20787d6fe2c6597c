"""The options of a conversion: the engine's, and how keywords of Python become options.

The command line and the API take the same options, declared once, as click's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptx.tensors.dtypes import SPELLINGS
from ckptx.text.sizes import parse_size

MODIFY = ("overwrite", "max_memory", "threads", "digest", "check_replicas")
"""The engine's options that a change of single tensors takes."""


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """A number of bytes: ``512MiB``, ``2GB``, ``1.5g``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Dtype(click.ParamType):  # type: ignore[type-arg]
    """A dtype by its torch name or a short one."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the torch name."""
        if value not in SPELLINGS:
            self.fail(f"{value!r} is not one of {', '.join(SPELLINGS)}", param, ctx)
        return SPELLINGS[value]


def engine_options() -> list[click.Option]:
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
            default="512MiB",
            show_default=True,
            help="Memory of the whole conversion: GB is 10^9 bytes, GiB and G are 2^30.",
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
        *_resume_options(),
        click.Option(
            ["--max-queue-size"],
            type=click.IntRange(1),
            default=50,
            show_default=True,
            help="Messages that may wait between the two processes.",
        ),
    ]


def _resume_options() -> list[click.Option]:
    """Return the options of interrupted runs."""
    return [
        click.Option(
            ["--resume/--no-resume"],
            default=True,
            help="Continue an interrupted run of the same conversion; or start over, and leave "
            "nothing if interrupted.  [default: resume]",
        ),
        click.Option(
            ["--journal-every"],
            type=Size(),
            default="256MiB",
            show_default=True,
            help="How much an interrupted run may have to write again.",
        ),
    ]


def megatron_options() -> list[click.Option]:
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
