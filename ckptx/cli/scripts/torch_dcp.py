"""PyTorch: ``torch.distributed.checkpoint.format_utils``, as a program and by its functions.

Source: torch:torch/distributed/checkpoint/format_utils.py @ v2.13.0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, flag
from ckptx.errors import PlanError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""Names that saver ``pytorch`` takes for those of a file."""


def file_places(source: str, target: str) -> tuple[str, str]:
    """Return source and target, which must be a file by its name.

    Raises:
        PlanError: the saver would make a directory of it.
    """
    if Path(target).suffix not in SUFFIXES:
        raise PlanError(
            f"{target}: is to be a file, and its name does not say so; end it in "
            f"{', '.join(SUFFIXES)}"
        )
    return source, target


_PLACES = (flag("src", "The checkpoint.", SOURCE), flag("dst", "What to write.", TARGET))

DCP_TO_TORCH = Script(
    "dcp_to_torch_save",
    "torch.distributed.checkpoint.format_utils",
    _PLACES,
    always=("--from", "dcp", "--to", "pytorch"),
    places=lambda values: file_places(values["src"], values["dst"]),
)

TORCH_TO_DCP = Script(
    "torch_save_to_dcp",
    "torch.distributed.checkpoint.format_utils",
    _PLACES,
    always=("--from", "pytorch", "--to", "dcp", "--target-names", "files"),
)

SCRIPTS = (
    DCP_TO_TORCH,
    TORCH_TO_DCP,
    Script(
        "format_utils",
        "python -m torch.distributed.checkpoint.format_utils",
        parts=(
            replace(DCP_TO_TORCH, name="dcp_to_torch"),
            replace(TORCH_TO_DCP, name="torch_to_dcp"),
        ),
    ),
)
