"""How much room a target needs, and what the disk has."""

from __future__ import annotations

import os
from pathlib import Path

from ckptx.protocol.contracts import SavePlan
from ckptx.text.sizes import size_text


def shortage(folder: Path, plan: SavePlan | None, occupied: int = 0) -> str:
    """Say how far a plan does not fit on the disk of ``folder``; empty if it does, or nobody knows.

    ``occupied`` bytes of the disk hold parts of the plan already. Without a plan, or when all of it
    is there, a disk is short only if it has nothing free at all.
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return ""  # a file system that does not tell
    block = status.f_frsize
    if not block or not status.f_blocks:
        return ""
    disk, free = mount_point(folder), status.f_bavail * block
    if status.f_files and not status.f_favail:
        return f"the disk {disk} has no room for another file (no free inode)"
    needed = sum(-(-file.size // block) * block for file in plan.files) if plan else 0
    missing = max(needed - occupied, block) - free  # manifest and journal want a block, too
    if missing <= 0:
        return ""
    return (
        f"the disk {disk} has {size_text(free)} free, {size_text(missing)} ({missing} bytes) less "
        "than is needed"
    )


def mount_point(path: Path) -> Path:
    """Return the directory at which the file system of a path is mounted."""
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def occupied_bytes(folder: Path) -> int:
    """Return the bytes of disk that the files below a folder take."""
    return sum(
        Path(place, name).lstat().st_blocks * 512
        for place, _, names in os.walk(folder)
        for name in names
    )
