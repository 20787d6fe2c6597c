"""A tensor that holds what the other checkpoint has under another name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ckptx.tensors.lazy import LazyTensor, Shape
from ckptx.verification.diagnosis.mistakes import Read, TensorPair, Variant
from ckptx.verification.pairing import Name, label


@dataclass(slots=True)
class MisplacedTensors:
    """The tensor has the wrong name, or was written twice."""

    name = "another-tensor"
    title = "tensors hold what the other side has under another name"
    advice = (
        "Names were mixed up, or one tensor was written over another. Look at the names below in "
        "the converter that wrote one of the sides, and convert again."
    )

    known: Mapping[tuple[Shape, bytes], Name] = field(default_factory=dict)
    """The tensors of A by shape and digest."""
    wanted: Mapping[Name, bytes | None] = field(default_factory=dict)
    """The digests of those tensors of B that differ."""

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return the name that the tensor has in A, if there is one."""
        digest = self.wanted.get(subject.name)
        other = self.known.get((subject.b, digest)) if digest is not None else None
        if other is None or other == subject.name:
            return

        def make(read: Read, name: Name) -> LazyTensor | None:
            return read(other) if name == subject.name else None

        yield Variant(self.name, f"{label(subject.name)} of B is {label(other)} of A", make)
