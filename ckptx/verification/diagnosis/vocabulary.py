"""Mistakes in the embedding and the output layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis.mistakes import Read, TensorPair, Variant
from ckptx.verification.pairing import Name

EMBEDDING: Name = ("embeddings", "word embeddings")
OUTPUT: Name = ("output layer", "weight")
_UNSCHEMED: Mapping[Name, Name] = {
    ("", "model.embed_tokens.weight"): ("", "lm_head.weight"),
    ("", "transformer.wte.weight"): ("", "lm_head.weight"),
}
_PAIRS = {EMBEDDING: OUTPUT, **_UNSCHEMED}


def partner(name: Name) -> Name | None:
    """Return the output layer of an embedding, and the embedding of an output layer."""
    for embedding, output in _PAIRS.items():
        if name in (embedding, output):
            return output if name == embedding else embedding
    return None


class TiedHead:
    """The output layer of one side is the embedding of the other."""

    name = "head-overwritten"
    title = "the output layer was overwritten by the embedding, or the reverse"
    advice = (
        "One side was handled as if its embeddings were tied. Set tie_word_embeddings to false in "
        "its config.json (or Megatron's --untie-embeddings-and-output-weights) and convert again: "
        "the weight that was overwritten is only in the original."
    )

    def forms(self, subject: TensorPair) -> Iterator[Variant]:
        """Return one in the place of the other."""
        if partner(subject.name) is not None:
            what = "output layer" if subject.name[-1].endswith("head.weight") else ""
            what = what or ("output layer" if subject.name == OUTPUT else "embedding")
            other = "embedding" if what == "output layer" else "output layer"
            yield Variant(self.name, f"the {what} of B is the {other} of A", _other)


def _other(read: Read, name: Name) -> LazyTensor | None:
    other = partner(name)
    return None if other is None else read(other)


class HeadTied:
    """One side has no output layer, because its embeddings are tied."""

    name = "head-tied"
    title = "the output layer is tied to the embedding on one side only"
    advice = TiedHead.advice


class Padding:
    """One side has rows of padding."""

    name = "vocabulary-padding"
    title = "one side holds rows of padding behind the vocabulary"
    advice = (
        "Megatron pads the vocabulary; Hugging Face's config.json says how many rows are real. "
        "Where rows were kept that are padding, convert again with --true-vocab-size N; where real "
        "rows were cut, with a larger N. All rows that both sides have agree as said here."
    )
