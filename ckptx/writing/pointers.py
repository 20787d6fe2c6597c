"""The small files beside a target that say which one is the latest."""

from __future__ import annotations

from pathlib import Path

from ckptx.protocol.contracts import SavePlan
from ckptx.writing.atomic import sync_directory, write_durable


def left(folder: Path, plan: SavePlan) -> dict[str, str]:
    """Return what the pointers of a plan say now that have something else to say in it."""
    there = {name: folder / name for name in plan.pointers if (folder / name).exists()}
    said = {name: pointer.read_bytes().strip() for name, pointer in there.items()}
    return {
        name: old.decode(errors="replace")
        for name, old in said.items()
        if old != plan.pointers[name].strip()
    }


def notes(folder: Path, plan: SavePlan) -> list[str]:
    """Return remarks on pointers that stay as they are."""
    loads = "" if plan.step_flag else ", without which nothing loads the result"
    return [
        f"{name} stays as it is{f' ({was})' if was.isprintable() else ''}; --overwrite moves it"
        f"{loads}"
        for name, was in left(folder, plan).items()
    ]


def write(folder: Path, plan: SavePlan, partial: Path, *, overwrite: bool) -> list[str]:
    """Write the pointers of a plan that are not there, or all; return remarks on the others."""
    remarks = [] if overwrite else notes(folder, plan)
    for name, content in plan.pointers.items():
        pointer = folder / name
        if overwrite or not pointer.exists():
            write_durable(partial / "pointer", content)
            (partial / "pointer").replace(pointer)
            sync_directory(pointer.parent)
    return remarks
