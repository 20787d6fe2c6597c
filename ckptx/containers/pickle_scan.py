"""Step over the opcodes of a pickle, and refuse those that are unsafe to execute.

Refused is what no pickler of protocol 2 to 5 writes and what lets a few bytes cost gigabytes: text
opcodes, extension codes, memo indices far beyond the pickle's size.

Tuples need more. As keys they are hashed in C, without a memory of what has been hashed: a chain of
tuples that hold the one before twice costs 2**links, one that is 100,000 deep overruns the C stack.
So the unpickler is made to show each tuple to `ckptx.containers.pickle_reader` when it is built,
before anything can hash it: `scan` puts a BINPERSID behind those opcodes that build one, except
where the tuple is seen to be small. The unpickler then calls `persistent_load` with the tuple and
goes on with what it gets.
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise

from ckptx.errors import FormatError

# Opcodes by their argument, protocols 2 to 5. `scan` steps over strings, and over what it marks.
# A small tuple is of numbers alone: as many as the opcode takes, or up to a mark. There may be one
# tuple around it, as in the arguments of a torch.Size.
_PLAIN = rb"(?:K.|M..|J....|[N\x88\x89]|G........)"  # numbers, None and booleans
_AROUND = rb"(?:(?:\x94|q.|r%(memo)s)?+\x85)?+"
_FIXED = (
    rb"(?:[)01Rabesu}\]\x81\x8f\x90\x92-\x94]++"  # no argument
    rb"|[hq\x80]."
    rb"|j....|r%(memo)s"  # LONG_BINPUT: the unpickler allocates up to its index
    rb"|\((?:" + _PLAIN + rb"{0,%(small)d}+t" + _AROUND + rb")?+"
    rb"|" + _PLAIN + rb"(?:\x85" + _AROUND + rb""
    rb"|" + _PLAIN + rb"(?:[\x85\x86]" + _AROUND + rb""
    rb"|" + _PLAIN + rb"++(?:[\x85-\x87]" + _AROUND + rb")?+)?+)?+"
    rb"|[t\x85-\x87](?=[Rb\x81])"  # not in the memo, and consumed by REDUCE, BUILD or NEWOBJ
    rb"|t(?=(?:\x94|q.|r....)?+Q)"  # `persistent_load` looks at it
    rb"|\x95........"
    rb"|c[^\n]{1,1000}\n[^\n]{1,1000}\n)*+"
)
_FIXED_SIMPLY = (
    rb"(?:[)(01NRabesu}\]\x81\x88\x89\x8f\x90\x92-\x94]++"
    rb"|[Khq\x80]."
    rb"|M..|[Jj]....|[G\x95]........)*+"
)
"""The same where no alternative fails late; so all tuples are weighed, which takes longer."""
_OTHERS = rb"c[^\n]{1,1000}\n[^\n]{1,1000}\n|r%(memo)s"
SMALL = 64
"""Values in a tuple that is small."""
_RE_IS_SOUND = sys.version_info >= (3, 11, 5)
"""Before, possessive quantifiers lose their place in what they repeat (python/cpython#106052)."""
_STOP = ord(".")
_BINPERSID = ord("Q")
_BUILDING = b"t\x85\x86\x87\x91"
"""TUPLE, TUPLE1 to TUPLE3 and FROZENSET."""
_LENGTHS = {
    **dict.fromkeys(b"U\x8cC\x8a", 1),
    **dict.fromkeys(b"XTB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
"""Bytes of the length that follows these opcodes, before the data."""
STORAGE, WEIGH = 0, 1
"""What a BINPERSID is for: it was in the pickle, or `scan` has put it there."""


def _memo_index(size: int) -> bytes:
    """Return a pattern for little-endian u32 below about twice ``size`` bytes of pickle."""
    digits = []
    for shift in (0, 8, 16, 24):
        highest = min(255, size >> shift)
        digits.append(rb"." if highest == 255 else rb"[\x00-\x%02x]" % highest)
    return b"".join(digits)


def scan(data: bytes, file: str) -> tuple[bytes, bytearray]:
    """Step over the opcodes, at some 100 MB/s, and refuse those that are unsafe to execute.

    Returns:
        The pickle with a BINPERSID behind every opcode that builds a tuple or a frozen set, unless
        that is small, or out of reach of everything but a call; and what every BINPERSID is for, in
        their order. (Frames become longer than they say: they only tell what to read ahead.)
    """
    values = {b"memo": _memo_index(len(data)), b"small": SMALL}
    others = re.compile(_OTHERS % values, re.DOTALL)
    fixed = re.compile((_FIXED if _RE_IS_SOUND else _FIXED_SIMPLY) % values, re.DOTALL)
    cuts = [0]
    calls = bytearray()
    position = 0
    while True:
        match = fixed.match(data, position)
        position = match.end() if match else position
        if position >= len(data):
            raise FormatError(f"{file}: the pickle has no end; the file is truncated")
        opcode = data[position]
        if (width := _LENGTHS.get(opcode)) is not None:
            start = position + 1 + width
            position = start + int.from_bytes(data[position + 1 : start], "little")
            if position > len(data):
                raise FormatError(
                    f"{file}: a string runs beyond the end of the pickle; it is truncated"
                )
        elif opcode in _BUILDING:
            position += 1
            cuts.append(position)
            calls.append(WEIGH)
        elif opcode == _BINPERSID:
            position += 1
            calls.append(STORAGE)
        elif match := others.match(data, position):
            position = match.end()
        elif opcode == _STOP:
            if len(cuts) == 1:
                return data, calls
            parts = [data[start:stop] for start, stop in pairwise([*cuts, position + 1])]
            return b"Q".join(parts), calls
        else:
            raise FormatError(
                f"{file}: expected a pickle opcode of protocol 2 to 5 at byte {position}, found "
                f"{data[position : position + 1]!r}; the file is damaged or no checkpoint"
            )
