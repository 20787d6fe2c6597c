"""The small files beside a target that say which one is the latest."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ckptx.protocol.contracts import SavePlan
from ckptx.writing.atomic import sync_directory, write_durable


def left(folder: Path, plan: SavePlan, earlier: Collection[str] = ()) -> dict[str, str]:
    """Return what the pointers of a plan say now that have something else to say in it.

    Nothing where one of them names an ``earlier`` step: then all move on.
    """
    there = {name: folder / name for name in plan.pointers if (folder / name).exists()}
    said = {name: pointer.read_bytes().strip() for name, pointer in there.items()}
    found = {
        name: old.decode(errors="replace")
        for name, old in said.items()
        if old != plan.pointers[name].strip()
    }
    return {} if any(old in earlier for old in found.values()) else found


def lag(folder: Path, plan: SavePlan, earlier: Collection[str]) -> bool:
    """Return whether a pointer to a target in place is not there, or names an ``earlier`` step."""
    return bool(left(folder, plan)) > bool(left(folder, plan, earlier)) or not all(
        (folder / name).exists() for name in plan.pointers
    )


def notes(folder: Path, plan: SavePlan, earlier: Collection[str] = ()) -> list[str]:
    """Return remarks on pointers that stay as they are."""
    loads = "" if plan.step_flag else ", without which nothing loads the result"
    return [
        f"{name} stays as it is{f' ({was})' if was.isprintable() else ''}; --overwrite moves it"
        f"{loads}"
        for name, was in left(folder, plan, earlier).items()
    ]


def write(
    folder: Path,
    plan: SavePlan,
    partial: Path,
    *,
    overwrite: bool,
    earlier: Collection[str] = (),
) -> list[str]:
    """Write the pointers of a plan that are not there, or all; return remarks on the others."""
    remarks = [] if overwrite else notes(folder, plan, earlier)
    staying = {} if overwrite else left(folder, plan, earlier)
    for name, content in plan.pointers.items():
        pointer = folder / name
        if overwrite or not pointer.exists() or name not in staying:
            write_durable(partial / "pointer", content)
            (partial / "pointer").replace(pointer)
            sync_directory(pointer.parent)
    return remarks
