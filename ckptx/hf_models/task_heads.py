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
from collections.abc import Collection, Iterable, Mapping

from ckptx.errors import listing
from ckptx.tensors.lazy import LazyTensor

_HEAD = re.compile(
    r"(score|classifier|(?!lm_)\w+_head|\w+_logit_scale|\w+_attnpool|regression|ranker)(\..+)?"
)
"""Whole names of what stands beside a language model, not in it."""
_AROUND = ("model.", "pretrained_model.", "base_model.", "actor.", "critic.")
"""What a module that holds a whole model calls it."""


def heads_of(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the names that are of a head, and not of the model itself.

    Examples:
        >>> heads_of(["lm_head.weight", "score.weight", "v_head.summary.bias"], ["lm_head.weight"])
        ['score.weight', 'v_head.summary.bias']
    """
    return [name for name in names if name not in known and _HEAD.fullmatch(name)]


def without_module(
    tensors: Mapping[str, LazyTensor], known: Collection[str]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors without what a module around the model has put before their names.

    It is taken off where most names are those of the model only without it, and off every name
    that has it; a head outside keeps its name. With them comes a remark, if anything changed.
    """
    plain = sum(name in known for name in tensors)
    for prefix in _AROUND:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        inside = sum(name in known for name in found)
        outside = [name for name in tensors if not name.startswith(prefix)]
        bare = all(_HEAD.fullmatch(name) for name in outside)
        if plain < inside and 2 * inside > len(found) == len(tensors) and bare:
            return found, (f"{prefix!r} was taken off the names: a module around the model put it",)
    return dict(tensors), ()


def remark(heads: Collection[str], architecture: str) -> str:
    """Return what is said of a model with a head that its config does not speak of."""
    return (
        f"{listing(heads)}: no part of {architecture}, but the head of a reward or value model; "
        "tensors pass through by name, and Megatron has no place for the head"
    )
