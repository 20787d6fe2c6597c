"""Reward and value models: a head beside a language model, and modules around both.

    score.weight                      transformers' classes for sequences and tokens, critics
    v_head.summary.weight             TRL, beside pretrained_model.
    preference_head.0.weight          LightRFT's scalar reward models, with preference_attnpool.*
    preference_logit_scale            and preference_logit_scale, beside model.

Sources: huggingface/transformers src/transformers/modeling_layers.py @ v5.23.0, huggingface/trl
trl/models/modeling_value_head.py @ v0.23.0, opendilab/LightRFT lightrft/models/{srm_vl,srm_al,
grm_vl,critic_language}.py @ main.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from ckptx.errors import listing
from ckptx.tensors.lazy import LazyTensor

_HEAD = re.compile(
    r"(score|classifier|(?!lm_)\w+_head|\w+_logit_scale|\w+_attnpool|regression|ranker)(\..+)?"
)
"""Whole names of what stands beside a language model, not in it."""
_AROUND = ("model.", "pretrained_model.", "base_model.", "actor.", "critic.")
"""What a module that holds a whole model calls it."""
_NUMBER = re.compile(r"\d+")
_LOOKED_FOR = 8  # names of the model, of which one is there wherever it lies


def heads_of(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the names that are of a head, and not of the model itself.

    Examples:
        >>> heads_of(["lm_head.weight", "score.weight", "v_head.summary.bias"], ["lm_head.weight"])
        ['score.weight', 'v_head.summary.bias']
    """
    return [name for name in names if name not in known and _HEAD.fullmatch(name)]


def in_doubt(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that a model has in other layers or experts: its config is another's then.

    Examples:
        >>> in_doubt(["a.1.w", "a.0.gain"], ["a.0.w", "b"])
        ['a.1.w']
    """
    kinds = {_NUMBER.sub("#", name) for name in known}
    return [name for name in names if _NUMBER.sub("#", name) in kinds]


def without_module(
    tensors: Mapping[str, LazyTensor], known: Collection[str]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors without what a module around the model has put before their names.

    It is taken off where most names are those of the model only without it, and off every name
    that has it; what is outside keeps its name. With them comes a remark, if anything changed.
    """
    plain = sum(name in known for name in tensors)
    if plain == len(tensors):
        return dict(tensors), ()
    for prefix in dict.fromkeys((*_AROUND, *_around(tensors, known))):
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        inside = sum(name in known for name in found)
        if plain < inside and 2 * inside > len(found) == len(tensors):
            return found, (f"{prefix!r} was taken off the names: a module around the model put it",)
    return dict(tensors), ()


def _around(names: Collection[str], known: Collection[str]) -> Iterator[str]:
    """Yield what may stand before the model's names: before the longest that a tensor ends with."""
    for one in sorted(known, key=len, reverse=True)[:_LOOKED_FOR]:
        if found := [name.removesuffix(one) for name in names if name.endswith(f".{one}")]:
            yield found[0]
            return


def remark(heads: Collection[str], architecture: str) -> str:
    """Return what is said of a model with a head that its config does not speak of."""
    return (
        f"{listing(heads)}: no part of {architecture}, but the head of a reward or value model; "
        "tensors pass through by name, and Megatron has no place for the head"
    )
