"""Sizes for people."""

from __future__ import annotations

import re


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


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)(B?)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return a size in bytes: ``GB`` is 10^9, ``GiB`` and ``G`` are 2^30.

    Raises:
        ValueError: it is none.

    Examples:
        >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size("2G"), parse_size("300")
        (5000000000, 1572864, 2147483648, 300)
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not (match[2] and match[4])):
        raise ValueError(f"{text!r} is not a size; write 5GB, 500MB or 2GiB")
    base = 1000 if match[4] and not match[3] else 1024
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
