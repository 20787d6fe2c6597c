"""The two checkpoints as hypotheses see them: readers of tensors, samples, dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from ckptx.model.canonical_names import VISION
from ckptx.model.spec import ModelSpec
from ckptx.storage.blocks import BlockReader
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis import attention
from ckptx.verification.diagnosis.mistakes import Read, TensorPair
from ckptx.verification.diagnosis.samples import Sampler, common_dtype
from ckptx.verification.pairing import Name, Paired


class Evidence:
    """Two checkpoints, and the names of the tensors that differ or that only one side has."""

    def __init__(self, paired: Paired, differing: Sequence[Name], reader: BlockReader) -> None:
        self.sides = (paired.left, paired.right)
        self.differing = tuple(differing)
        self.reader = reader
        self.sampler = Sampler(reader.files)
        self.reads = (self._reader(0), self._reader(1))

    def subject(self, name: Name) -> TensorPair | None:
        """Return what is known of a tensor, None if a side has not got it."""
        a, b = (read(name) for read in self.reads)
        if a is None or b is None:
            return None
        return TensorPair(name, a.shape, b.shape, self.spec(name))

    def spec(self, name: Name) -> ModelSpec | None:
        """Return the dimensions of the part of the model that a tensor is of, if known."""
        message = name[0]
        if not message:
            return None
        if not message.startswith(VISION):
            part = "language"
        else:
            part = "projection" if message.startswith("vision ") else "vision"
        return self.sides[0].parts.get(part) or self.sides[1].parts.get(part)

    def digests(self, name: Name) -> tuple[bytes | None, bytes | None]:
        """Return digests of samples of a tensor on both sides, in the narrower of their dtypes."""
        a, b = (side.tensors.get(name) for side in self.sides)
        if a is None or b is None or (dtype := common_dtype(a.dtype, b.dtype)) is None:
            return None, None
        return self.sampler.digest(0, a, dtype), self.sampler.digest(1, b, dtype)

    def _reader(self, side: int) -> Read:
        tensors = self.sides[side].tensors

        def read_part(name: Name) -> LazyTensor | None:
            return attention.reader_of_parts(tensors.get, self.spec(name))(name)

        return read_part
