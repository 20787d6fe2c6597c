"""Sizes for people."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Return a size for people.

    Examples:
        >>> size_text(999), size_text(5 << 20)
        ('999 bytes', '5.0 MiB')
    """
    if nbytes < 1024:
        return f"{nbytes:.0f} byte{'s' * (nbytes != 1)}"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.2f} TiB"
