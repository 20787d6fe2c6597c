"""Every input that is kept, and some thousands made from them, raise nothing but a `CkptxError`."""

from __future__ import annotations

import random

import pytest

from ckptx.errors import CkptxError
from tests.work import at_most

from .targets import CORPUS, TARGETS, run


def corpus(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target):
    for data in corpus(target):
        with at_most():
            run(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_a_seed_is_read(target):
    """A target that refuses all of its seeds would see nothing of what lies behind."""
    for data in corpus(target):
        try:
            TARGETS[target](data)
        except CkptxError as error:
            last = error
        else:
            return
    raise AssertionError(str(last))


@pytest.mark.parametrize("count", [30, pytest.param(3000, marks=pytest.mark.full)])
@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target, count):
    generator = random.Random(f"{target} {count}")
    seeds = corpus(target)
    for _ in range(count):
        data = mutated(generator.choice(seeds), seeds, generator)
        try:
            run(target, data)
        except Exception as error:
            raise AssertionError(f"{target}: {data!r}: {error!r}") from error


def mutated(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """Flip, cut, repeat and splice."""
    new = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        if not new:
            return bytes(new)
        place = generator.randrange(len(new))
        match generator.randrange(5):
            case 0:
                new[place] = generator.randrange(256)
            case 1:
                del new[place : place + generator.randint(1, 16)]
            case 2:
                new[place:place] = new[place : place + generator.randint(1, 32)]
            case 3:
                other = generator.choice(others)
                start = generator.randrange(len(other))
                new[place:place] = other[start : start + generator.randint(1, 32)]
            case _:
                new[place] = generator.choice(b"\x00\x01\x7f\x80\xff()[]{}.0123456789\"',:-")
    return bytes(new)
