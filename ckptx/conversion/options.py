"""The options of a conversion: the engine's, and how keywords of Python become options.

The command line and the API take the same options, declared once, as click's.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class DtypeOf(Dtype):
    """A dtype of all tensors, or after ``GLOB=`` of those of these names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the glob, empty for all tensors, and the torch name of the dtype."""
        if isinstance(value, tuple):  # from Python
            glob, equals, dtype = value[0], "=", value[1]
        else:
            glob, equals, dtype = value.rpartition("=")
        if equals and not glob:
            self.fail(f"{value!r} has no GLOB before the =", param, ctx)
        return glob, super().convert(dtype, param, ctx)


class Overwrite(click.ParamType):  # type: ignore[type-arg]
    """What may be replaced: nothing, a target that ckptx wrote, or ``foreign`` files, too."""

    name = "overwrite"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | str:
        """Return False, True or ``"foreign"``."""
        if value in (True, False, "ours"):
            return bool(value)
        if value != "foreign":
            self.fail(f"{value!r} is not 'foreign', the only value that it takes", param, ctx)
        return "foreign"


def overwrite_spelled_out(args: Sequence[str]) -> list[str]:
    """Return words of a command line with a value for ``--overwrite`` where it has none.

    Click would take the next word for it.

    Examples:
        >>> overwrite_spelled_out(["--overwrite", "a", "--", "--overwrite"])
        ['--overwrite=ours', 'a', '--', '--overwrite']
    """
    end = args.index("--") if "--" in args else len(args)
    before = [f"{arg}=ours" if arg == "--overwrite" else arg for arg in args[:end]]
    return [*before, *args[end:]]


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
"""The type of a directory that exists."""


def option(names: str, type: Any, help: str, default: Any = None, **more: Any) -> click.Option:
    """Return an option of these names, separated by blanks; its default, if any, is shown."""
    if default is not None:  # for click None is a default, too
        more = {"default": default, "show_default": True, **more}
    return click.Option(names.split(), type=type, help=help, **more)


def switch(names: str, help: str, **more: Any) -> click.Option:
    """Return an option without a value."""
    return click.Option(names.split(), is_flag=True, help=help, **more)


def overwrite_option() -> click.Option:
    """Return ``--overwrite``; its words go through `overwrite_spelled_out`."""
    about = "Replace an existing target that ckptx wrote; with =foreign whoever wrote it."
    more = {"metavar": "[=foreign]", "show_default": False}
    return option("--overwrite", Overwrite(), about, False, **more)


def engine_options() -> list[click.Option]:
    """Return the options of a conversion that belong to no plugin."""
    filled = "Take tensors of this name from --hf-base if the source lacks them. Repeatable."
    memory = "Memory of the whole conversion: GB is 10^9 bytes, GiB and G are 2^30."
    threads = "Threads that move bytes.  [as many as help]"
    replicas = "How much of a tensor's further copies is compared."
    resume = (
        "Continue an interrupted run of the same conversion; or start over, and leave nothing if "
        "interrupted.  [default: resume]"
    )
    lock = (
        "Lock the target while it is written; not where locks hang: then nobody else may write "
        "there.  [default: lock]"
    )
    cast = (
        "Convert weights to this dtype, with GLOB= those so named by Hugging Face. Repeatable; the "
        "last that matches counts.  [as stored]"
    )
    compared = click.Choice(["all", "sample", "none"])
    digests = click.Choice(["xxh3_128", "sha256"])
    return [
        option("--dtype dtypes", DtypeOf(), cast, multiple=True, metavar="[GLOB=]DTYPE"),
        overwrite_option(),
        option("--hf-base", FOLDER, "Hugging Face model to take config and tokenizer from."),
        option("--fill-from-base", str, filled, multiple=True, metavar="GLOB"),
        option("--max-memory", Size(), memory, "512MiB"),
        option("--threads", click.IntRange(0, 1024), threads, 0, show_default=False),
        option("--digest", digests, "Digest of the manifest's tensors.", "xxh3_128"),
        option("--check-replicas", compared, replicas, "sample"),
        option("--resume/--no-resume", None, resume, True, show_default=False),
        option("--lock/--no-lock", None, lock, True, show_default=False),
        option(
            "--journal-every",
            Size(),
            "How much an interrupted run may have to write again.",
            "256MiB",
        ),
        option(
            "--max-queue-size",
            click.IntRange(1),
            "Messages that may wait between the two processes.",
            50,
        ),
    ]


def megatron_options(*, hidden: bool = False) -> list[click.Option]:
    """Return the options that concern Megatron-style modules only."""
    model, path = "Type of the model.", "Megatron-LM checkout that modules import."
    any_order = "Let modules send messages in any order."
    return [
        option("--model-type", click.Choice(["GPT", "BERT"]), model, "GPT", hidden=hidden),
        switch("--no-checking checking", any_order, flag_value=False, default=True, hidden=hidden),
        option("--megatron-path", str, path, metavar="DIR", hidden=hidden),
    ]
