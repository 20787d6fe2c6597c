"""Mistakes in the embedding and the output layer."""

from __future__ import annotations

from collections.abc import Iterator

from ckptx.verification.diagnosis.evidence import TensorPair
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, of_partner
from ckptx.verification.pairing import Name

EMBEDDING: Name = ("embeddings", "word embeddings")
OUTPUT: Name = ("output layer", "weight")
_HEAD: Name = ("", "lm_head.weight")
_EMBEDDINGS = (("", "model.embed_tokens.weight"), ("", "transformer.wte.weight"))
"""Names that models without a schema have."""


def partner(name: Name) -> Name | None:
    """Return the output layer of an embedding, and the embedding of an output layer."""
    pairs = {EMBEDDING: OUTPUT, OUTPUT: EMBEDDING, _HEAD: _EMBEDDINGS[0]}
    return (pairs | dict.fromkeys(_EMBEDDINGS, _HEAD)).get(name)


def _overwritten(pair: TensorPair) -> Iterator[Variant]:
    """Yield one in the place of the other."""
    if partner(pair.name) is not None:
        head = pair.name in (OUTPUT, _HEAD)
        one, other = ("output layer", "embedding")[:: 1 if head else -1]
        yield Variant(f"the {one} of B is the {other} of A", of_partner(partner))


TIED_HEAD = Hypothesis(
    "head-overwritten",
    "the output layer was overwritten by the embedding, or the reverse",
    "One side was handled as if its embeddings were tied. Set tie_word_embeddings to false in "
    "its config.json (or Megatron's --untie-embeddings-and-output-weights) and convert again: "
    "the weight that was overwritten is only in the original.",
    _overwritten,
)
HEAD_TIED = Hypothesis(
    "head-tied", "the output layer is tied to the embedding on one side only", TIED_HEAD.advice
)
PADDING = Hypothesis(
    "vocabulary-padding",
    "one side holds rows of padding behind the vocabulary",
    "Megatron pads the vocabulary; Hugging Face's config.json says how many rows are real. "
    "Where rows were kept that are padding, convert again with --true-vocab-size N; where real "
    "rows were cut, with a larger N. All rows that both sides have agree as said here.",
)
