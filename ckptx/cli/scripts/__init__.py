"""The conversion scripts of other projects, as tables: what a flag of theirs is for ckptx.

One module per project. Nothing of a script is run; `ckptx.cli.scripts.script` makes the command of
ckptx that means the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from ckptx.cli.scripts.script import Script

PROJECTS = ("verl", "lightrft", "rlinf", "deepspeed", "megatron", "accelerate", "torch_dcp")
"""The modules with the tables, in the order of the documents."""


def scripts() -> Iterator[Script]:
    """Yield every script that is known."""
    for project in PROJECTS:
        yield from import_module(f"{__name__}.{project}").SCRIPTS


def named(name: str) -> Script | None:
    """Return the script that a user means: by its name, its path or its module.

    Examples:
        >>> named("scripts/legacy_model_merger.py").name
        'model_merger'
        >>> named("deepspeed.utils.zero_to_fp32").name
        'zero_to_fp32'
    """
    known = {spelling: script for script in scripts() for spelling in script.spellings}
    file = name.replace("-", "_").rpartition("/")[2].removesuffix(".py").removesuffix(".sh")
    return known.get(file) or known.get(file.rpartition(".")[2])
