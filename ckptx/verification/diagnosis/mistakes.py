"""What a mistake is: a way in which the tensors of B were made from those of A.

A variant of a mistake builds, from the lazy tensors of A, the tensor that B holds under a name if
just this has happened. Variants are chained by reading through one another, so two mistakes at once
need no code of their own. Which side is right, the data cannot tell: the inverse of a variant is a
variant too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis.evidence import Read, TensorPair
from ckptx.verification.pairing import Name

Make: TypeAlias = Callable[[Read, Name], LazyTensor | None]
"""Returns what B holds under a name, given how to read A; None if the mistake does not apply."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of a mistake: ``detail`` is what happened, in words; ``make`` makes it happen.

    ``mistake``, the name of the hypothesis, and ``detail`` together tell it from all others.
    """

    detail: str
    make: Make
    partner: Callable[[Name], Name | None] = lambda name: None
    """The tensor that must have suffered the same for the variant to be what happened."""
    mistake: str = ""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A known mistake."""

    name: str
    """Stable, for ``--json``."""
    title: str
    """The mistake in a few words."""
    advice: str
    """What to do, for somebody who has not made converters."""
    forms: Callable[[TensorPair], Iterable[Variant]] = lambda pair: ()
    """Returns the forms that it can take in a tensor, the most common first."""

    def variants(self, pair: TensorPair) -> Iterator[Variant]:
        """Yield the forms that it can take in a tensor, under its name."""
        for variant in self.forms(pair):
            yield replace(variant, mistake=self.name)


def on_one(change: Callable[[LazyTensor], LazyTensor]) -> Make:
    """Return how to make a tensor by changing the one of the same name."""

    def make(read: Read, name: Name) -> LazyTensor | None:
        tensor = read(name)
        return None if tensor is None else change(tensor)

    return make


def of_partner(partner: Callable[[Name], Name | None]) -> Make:
    """Return how to make a tensor by taking its partner."""

    def make(read: Read, name: Name) -> LazyTensor | None:
        other = partner(name)
        return None if other is None else read(other)

    return make
