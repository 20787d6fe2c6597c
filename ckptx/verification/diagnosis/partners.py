"""Mistakes between two tensors that belong together.

Gate and up projection of gated MLPs, dense or of experts; the embedding and the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ckptx.tensors.joins import deinterleave, interleave
from ckptx.tensors.lazy import LazyTensor
from ckptx.verification.diagnosis.evidence import Read, TensorPair
from ckptx.verification.diagnosis.mistakes import Hypothesis, Variant, of_partner
from ckptx.verification.pairing import Name

_RANKS = 64  # most tensor-parallel ranks that are tried
# Names that models without a schema have: Llama's relatives and Mixtral's experts.
_PARTNERS = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}


def gate_or_up(name: Name) -> Name | None:
    """Return the up projection of a gate, and the gate of an up projection."""
    message, key = name
    stem, _, last = key.rpartition(" ")
    if message and last in ("W", "V") and "l0" in stem:
        return message, f"{stem} {'V' if last == 'W' else 'W'}"
    words = [_PARTNERS.get(word, word) for word in key.split(".")]
    other = ".".join(words)
    return (message, other) if other != key else None


_other = of_partner(gate_or_up)


def _exchanged(pair: TensorPair) -> Iterator[Variant]:
    if gate_or_up(pair.name) is not None:
        yield Variant("the gate of A is the up projection of B", _other, gate_or_up)


GATE_UP = Hypothesis(
    "gate-up-exchanged",
    "gate and up projection are exchanged",
    "One side was split, or named, the other way round. In Megatron's fused linear_fc1 the "
    "gate comes first; Mixtral's w1 is the gate, w3 the up projection. Convert that side "
    "again; the model computes nonsense as it is.",
    _exchanged,
)


def _joined(pair: TensorPair) -> Iterator[Variant]:
    """Yield every number of ranks, in both directions."""
    named = not pair.name[0]
    if named or gate_or_up(pair.name) is None or pair.a != pair.b:
        return
    axis = 1 if len(pair.a) == 3 else 0
    for ranks in range(2, _RANKS + 1):
        if pair.a[axis] % ranks:
            continue
        joined = f"{ranks} ranks, joined as they stand, were read as one"
        yield Variant(joined, partial(_regrouped, ranks, 1, axis), gate_or_up)
        whole = f"one whole was read as {ranks} ranks"
        yield Variant(whole, partial(_regrouped, 1, ranks, axis), gate_or_up)


def _regrouped(ranks: int, read_ranks: int, axis: int, read: Read, name: Name) -> LazyTensor | None:
    """Return the gate, or the up projection, where two of ``ranks`` were read as ``read_ranks``."""
    own, other = read(name), _other(read, name)
    if own is None or other is None or own.shape != other.shape:
        return None
    is_gate = name[1].endswith("W")
    fused = interleave([own, other] if is_gate else [other, own], ranks, axis)
    sizes = [own.shape[axis]] * 2
    return deinterleave(fused, sizes, read_ranks, axis)[0 if is_gate else 1]


GATE_UP_RANKS = Hypothesis(
    "gate-up-ranks",
    "gate and up projection of tensor-parallel ranks were joined without taking them apart",
    "Each rank holds half gate, half up projection; joined as they stand they are [gate, up] "
    "rank after rank. Split every rank's weight in two before joining the halves: convert "
    "again from the ranks' files.",
    _joined,
)

EMBEDDING: Name = ("embeddings", "word embeddings")
OUTPUT: Name = ("output layer", "weight")
_HEAD: Name = ("", "lm_head.weight")
_EMBEDDINGS = (("", "model.embed_tokens.weight"), ("", "transformer.wte.weight"))
"""Names that models without a schema have."""


def head_or_embedding(name: Name) -> Name | None:
    """Return the output layer of an embedding, and the embedding of an output layer."""
    pairs = {EMBEDDING: OUTPUT, OUTPUT: EMBEDDING, _HEAD: _EMBEDDINGS[0]}
    return (pairs | dict.fromkeys(_EMBEDDINGS, _HEAD)).get(name)


def _overwritten(pair: TensorPair) -> Iterator[Variant]:
    """Yield one in the place of the other."""
    if head_or_embedding(pair.name) is not None:
        head = pair.name in (OUTPUT, _HEAD)
        one, other = ("output layer", "embedding")[:: 1 if head else -1]
        yield Variant(f"the {one} of B is the {other} of A", of_partner(head_or_embedding))


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
    "one side has more rows behind the vocabulary",
    "Under Hugging Face's names every row is trained: one of two such models was resized. Megatron "
    "pads the vocabulary: where its padding was kept, or real rows were cut with it, convert that "
    "checkpoint again with --true-vocab-size N. All rows that both sides have agree as said here.",
)
