"""DeepSpeed: ``zero_to_fp32.py``, which it copies into every checkpoint.

Source: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py @ v0.19.8; before v0.16 the second
argument was a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptx.cli.scripts.script import SAME, SOURCE, TARGET, Script, Values, flag, switch
from ckptx.cli.scripts.torch_dcp import SUFFIXES


def _form(values: Values) -> Iterator[str]:
    """Yield what is written: the files of a model, or one file, as old releases did."""
    if Path(values["output_dir"]).suffix in SUFFIXES:
        yield from ("--to", "pytorch")
        return
    yield from ("--to", "hf", "--no-config")
    if not values["safe_serialization"]:
        yield from ("--weight-files", "bin")
    yield from ("--max-shard-size", values["max_shard_size"])


ZERO_TO_FP32 = Script(
    "zero_to_fp32",
    "DeepSpeed, deepspeed/utils/zero_to_fp32.py",
    (
        flag("checkpoint_dir", "The checkpoint.", SOURCE),
        flag(
            "output_dir",
            "Directory to write; or one file, pytorch_model.bin, as in old releases.",
            TARGET,
        ),
        flag("--max_shard_size", "Largest file.", default="5GB"),
        switch("--safe_serialization", "Write safetensors, not pytorch_model.bin."),
        flag("--tag -t", "Tag below the checkpoint.  [what latest says]", SAME),
        switch("--exclude_frozen_parameters", "Leave out what was not trained.", SAME),
        switch("--debug -d", "Show details.", "--verbose"),
    ),
    always=("--from", "deepspeed"),
    further=_form,
)

SCRIPTS = (ZERO_TO_FP32,)
