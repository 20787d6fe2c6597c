"""The numbers of layers: in names, and as a user lists them."""

from __future__ import annotations

import re

from ckptx.errors import PlanError


def layer_number(name: str) -> int | None:
    """Return the number of the layer in a name, None where there is none.

    Examples:
        >>> layer_number("model.layers.3.mlp.experts.7.w1"), layer_number("mp_rank_01:0:lm_head")
        (3, None)
    """
    match = re.search(r"(?:layers?|\bh|blocks?)[. ](\d+)\b", name)
    return int(match[1]) if match else None


def parse_layers(text: str) -> frozenset[int]:
    """Return the numbers of layers that ``0,4-7`` means.

    Raises:
        PlanError: it means none.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise PlanError(f"{text!r} is no list of layers; write 3, or 0,4-7")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)
