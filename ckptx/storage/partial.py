"""The names of what a conversion leaves behind, and whether one is still at work there."""

from __future__ import annotations

import fcntl
import os

from ckptx.storage.location import Location

PARTIAL = ".ckptx-partial"
LOCK, OWNER = "lock", "owner"
"""What of a partial directory says that a run is at work: locked by the kernel, or just there."""


MANIFEST = "ckptx-manifest.json"


def is_held(partial: Location) -> bool:
    """Return whether a run is at work in a partial directory."""
    try:
        lock = os.open(partial / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return (partial / OWNER).exists()
    finally:
        os.close(lock)
    return False
