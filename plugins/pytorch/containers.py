"""Which of the dictionaries in a file of a training is the model: trainers nest them as they like.

    model                       state.model  (composer)         state_dict  (Lightning)
    fsdp_checkpoint.model       app.model                       actor_module, policy.state_dict
    ema_model                   optimizer.state.0               rng_state

What holds tensors is a container, and is called by its path.

Sources: RLinf/RLinf rlinf/hybrid_engines/fsdp/strategy/checkpoint.py @ 85104b9, mosaicml/composer
composer/utils/checkpoint.py @ v0.32, Lightning-AI/pytorch-lightning
src/lightning/pytorch/trainer/connectors/checkpoint_connector.py @ 2.5.5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import click

from ckptx.containers.sharded import is_sharded
from ckptx.containers.torch_zip import stored_bytes
from ckptx.conversion.options import option
from ckptx.errors import FormatError, listing
from ckptx.hf_models.wrappers import unwrapped
from ckptx.protocol.messages import TRAINING_STATE, Dropped
from ckptx.tensors.lazy import Stored

TRAINING = (
    *("optim", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "rng", "scheduler"),
    *("train_state", "dataloader"),
)
"""Words of a path that say: state of the training, not weights."""
_TRAINING = re.compile(rf"({'|'.join(TRAINING)})(_.*)?|.*_(optimizer|optim|scheduler|rng)(_.*)?")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step")
"""The last words of the names that optimizers' states have."""
_USUAL = ("model", "state_dict", "model_state_dict", "module")
_AVERAGE = re.compile(r"(.*_)?(ema|swa|avg|averaged?)(_.*)?")
_DEEPEST = 8
_ROOT = "(the file itself)"


def container_option() -> click.Option:
    """Return ``--container``, which loaders of files of a training declare alike."""
    about = (
        "Path of the model in the saved dictionary, as 'app.model'.  "
        "[default: the one that holds weights]"
    )
    return option("--container", str, about)


def state_dicts(value: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return the dictionaries in a file that hold tensors, by their paths; the root's is empty."""
    return dict(_walk(value, (), set()))


def _walk(
    value: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if len(path) > _DEEPEST:
        return
    if any(isinstance(one, Stored) or is_sharded(one) for one in value.values()) or (
        isinstance(value.get("language_model"), Mapping)
    ):
        yield ".".join(path), value  # by each of its names
    if id(value) in seen:
        return  # a pickle may hold itself, and one dictionary many times
    seen.add(id(value))
    for key, inner in value.items():
        if isinstance(inner, Mapping) and key != "language_model":
            yield from _walk(inner, (*path, str(key)), seen)


def choose(
    names: Mapping[str, Collection[str]],
    asked: str | None,
    model: Collection[str],
    source: object,
) -> tuple[str, tuple[str, ...]]:
    """Return the container that is the model, and a remark where that is not plain.

    Args:
        names: the names of the tensors in each container.
        asked: what ``--container`` says.
        model: the names that the model has by its config, empty where none is known.
        source: what is read, for messages.

    Raises:
        FormatError: there is none, or there are several and nobody says which.
    """
    if asked is not None:
        if asked not in names:
            found = listing(sorted(name or _ROOT for name in names))
            raise FormatError(f"{source}: holds no container {asked!r}; found {found}")
        return asked, ()
    weights = [path for path in names if not _is_training(path, names[path])]
    if len(weights) > 1:
        weights = [path for path in weights if any("." in one for one in names[path])] or weights
    known = set(model)
    fitting = [p for p in weights if 2 * len({*map(unwrapped, names[p])} & known) > len(known) > 0]
    rest = fitting or weights
    rest = [p for p in rest if not any(map(_AVERAGE.fullmatch, p.split(".")))] or rest
    rest = [p for p in rest if p.split(".")[-1] in _USUAL] or rest
    if len(rest) != 1:
        there = listing(sorted(path or _ROOT for path in rest or names))
        if not rest and all(_is_training(path, names[path]) for path in names):
            raise FormatError(
                f"{source}: is the state of an optimizer ({there}); give the checkpoint that it "
                "lies in"
            )
        what = "several containers of weights" if rest else "no container of weights"
        raise FormatError(f"{source}: holds {what}: found {there}; say which with --container")
    (found,) = rest
    others = [path or _ROOT for path in weights if path != found]
    if others:
        return found, (
            f"the weights are those of {found or _ROOT!r}; {listing(others)} hold"
            f"{'s' * (len(others) == 1)} weights, too: --container takes them",
        )
    return found, (f"the weights are those of {found!r}",) if "." in found else ()


def _is_training(path: str, names: Collection[str]) -> bool:
    return any(map(_TRAINING.fullmatch, path.split("."))) or all(
        name.rpartition(".")[2] in _MOMENTS for name in names
    )


def left(value: Mapping[Any, Any], path: str) -> tuple[Dropped, ...]:
    """Return what lies in a file beside the container that is taken, with its bytes."""
    found: list[Dropped] = []
    inner, place = value, ""
    while place != path:
        key = next(
            one
            for one, below in inner.items()
            if isinstance(below, Mapping)
            and f"{path}.".startswith(f"{place}.{one}.".removeprefix("."))
        )
        for other, below in inner.items():
            if other != key and below is not None:
                name = f"{place}.{other}".removeprefix(".")
                found.append(Dropped(name, TRAINING_STATE, stored_bytes(below)))
        place, inner = f"{place}.{key}".removeprefix("."), inner[key]
    return tuple(found)
