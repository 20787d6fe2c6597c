"""What a mistake is: a way in which the tensors of B were made from those of A.

A form of a mistake builds, from the lazy tensors of A, the tensor that B holds under a name if just
this has happened. Forms are chained by reading through one another, so two mistakes at once need no
code of their own. Which side is right, the data cannot tell: the inverse of a form is a form too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ckptx.model.spec import ModelSpec
from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.verification.pairing import Name

Read: TypeAlias = Callable[[Name], LazyTensor | None]
"""Returns the tensor of a name, None if there is none."""
Make: TypeAlias = Callable[[Read, Name], LazyTensor | None]
"""Returns what B holds under a name, given how to read A; None if the mistake does not apply."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of a mistake: ``said`` is what happened, in words; ``make`` makes it happen.

    ``mistake`` and ``said`` together tell it from all others.
    """

    mistake: str
    said: str
    make: Make
    partner: Callable[[Name], Name | None] = lambda name: None
    """The tensor that must have suffered the same for the form to be what happened."""


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor that differs, and what is known of it."""

    name: Name
    a: Shape
    b: Shape
    spec: ModelSpec | None
    """The dimensions of the part of the model that it is of, None where they are unknown."""


class Hypothesis(Protocol):
    """A known mistake."""

    name: str
    """Stable, for ``--json``."""
    title: str
    """The mistake in a few words."""
    advice: str
    """What to do, for somebody who has not made converters."""

    def forms(self, subject: TensorPair) -> Iterable[Variant]:
        """Return the forms that it can take in a tensor, the most common first."""


def chained(first: Variant, second: Variant) -> Make:
    """Return how a tensor is made if both have happened, one after the other."""

    def make(read: Read, name: Name) -> LazyTensor | None:
        return second.make(lambda other: first.make(read, other), name)

    return make


def on_one(change: Callable[[LazyTensor], LazyTensor]) -> Make:
    """Return how to make a tensor by changing the one of the same name."""

    def make(read: Read, name: Name) -> LazyTensor | None:
        tensor = read(name)
        return None if tensor is None else change(tensor)

    return make
