"""Two checkpoints under names that they share, so that they can be compared tensor by tensor.

Where a schema knows both models these are the canonical names and shapes; where it knows one, those
of Hugging Face; where it knows none, the names as they are. A checkpoint whose tensors do not fit
its own config cannot be converted, but it can be compared: what fits is canonical, and the rest
keeps its name and shape on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from ckptx.errors import CkptxError, PlanError, SchemaError, listing
from ckptx.model.layout import Parts, Rule, RuleGroup
from ckptx.model.sharding import Gatherer, shard_tensors
from ckptx.protocol.messages import Begin, End
from ckptx.protocol.model import VOCAB_TENSORS, Model, leave_unused, named_tensors
from ckptx.protocol.sidecars import read_config
from ckptx.registry import registry
from ckptx.registry.families import family_named
from ckptx.registry.open import Checkpoint
from ckptx.tensors.lazy import LazyTensor

_SETTINGS = (
    *("num_attention_heads", "num_query_groups", "norm_epsilon", "normalization", "activation"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_scaling"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
)
"""Of a `ckptx.model.spec.ModelSpec`: what equal weights compute depends on."""

Name: TypeAlias = tuple[str, str]
"""Message and key of a canonical tensor; no message and its own name of any other."""


@dataclass(slots=True)
class Side:
    """One of two checkpoints: tensors by name, and the dimensions of the model where known."""

    files: tuple[str, ...]
    tensors: dict[Name, LazyTensor]
    parts: Parts = field(default_factory=dict)


@dataclass(slots=True)
class Paired:
    """Two checkpoints under names that they share, and remarks on how they came to them."""

    left: Side
    right: Side
    notes: tuple[str, ...] = ()
    architectures: str = ""
    """What the two models are, where they are of different architectures."""


@dataclass(slots=True)
class _Loaded:
    """A checkpoint as its loader sent it; one that does not fit its config with its own names."""

    model: Model
    misfit: str = ""
    own: dict[str, LazyTensor] = field(default_factory=dict)
    """The tensors of a misfit under their own names."""


def label(name: Name) -> str:
    """Return what a tensor is called.

    Examples:
        >>> label(("transformer layer 3", "qkv weight")), label(("", "lm_head.weight"))
        ('transformer layer 3: qkv weight', 'lm_head.weight')
    """
    message, key = name
    return f"{message}: {key}" if message else key


def pair(left: Checkpoint, right: Checkpoint) -> Paired:
    """Return two checkpoints under common names.

    Raises:
        CkptxError: one of them fits neither its config nor any names, or they have none in common.
    """
    loaded = (_loaded(left), _loaded(right))
    misfits = tuple(
        f"{side} does not fit its own config, so the rest of it is compared as stored: {one.misfit}"
        for side, one in zip("AB", loaded, strict=True)
        if one.misfit
    )
    if misfits:
        return _pair_misfits(loaded, misfits)
    models = {side: one.model for side, one in zip("AB", loaded, strict=True)}
    settings = tuple(_other_settings(*models.values()))
    notes = (
        *settings,
        *_left_out(models),
        *_same_use(models),
        *_same_vocabulary(models),
    )
    known = [model.passthrough is None for model in models.values()]
    if all(known):
        a, b = (_side(model, _canonical(model)) for model in models.values())
        return Paired(a, b, notes, _architectures(models, a, b, bool(settings)))
    if any(known):
        _check_names(models.values())
    else:
        notes += ("no schema knows these models: tensors are compared by name",)
    a, b, remarks = _of_hugging_face(models)
    return Paired(a, b, (*notes, *remarks), _architectures(models, a, b, bool(settings)))


def _architectures(models: Mapping[str, Model], a: Side, b: Side, other_settings: bool) -> str:
    """Return what two models are, if they are of different architectures; else nothing.

    Megatron's args have no name for a family, so another name alone is none: tensors, shapes or
    settings are different, too.
    """
    said = []
    for model in models.values():
        config = read_config(model.begin.sidecars, model.begin.root) or {}
        spec = model.begin.parts.get("language")
        names = config.get("architectures") or [spec.architecture if spec else ""]
        kind = spec.family if spec else str(config.get("model_type") or "")
        said.append((kind, f"{kind} ({names[0]})" if names[0] else kind))
    (kind, first), (other, second) = said
    shapes = ({name: one.shape for name, one in side.tensors.items()} for side in (a, b))
    same = not other_settings and next(shapes) == next(shapes)
    return f"A is {first}, B is {second}" if kind and other and kind != other and not same else ""


def _check_names(models: Iterable[Model]) -> None:
    """Raise for a model that no schema knows with names of another kind than Hugging Face's."""
    for model in models:
        if model.passthrough is not None and not model.begin.layout.startswith("hf"):
            raise PlanError(
                f"{model.begin.root}: tensors are named as {model.begin.layout} and no schema "
                "knows their model; only the same names can be compared"
            )


def _side(model: Model, tensors: dict[Name, LazyTensor]) -> Side:
    return Side(model.begin.files, tensors, model.begin.parts)


def _loaded(checkpoint: Checkpoint) -> _Loaded:
    if (misfit := checkpoint.misfit) is None:
        return _Loaded(checkpoint.model)
    if isinstance(misfit, SchemaError) and (found := _misfit(checkpoint.begin, str(misfit))):
        return found
    raise misfit


def _misfit(begin: Begin, reason: str) -> _Loaded | None:
    """Return what fits of a model with Hugging Face's names, and the rest by name.

    None if its names are not those of its family: then nothing can be compared.
    """
    if "language" not in begin.parts or not begin.layout.startswith("hf"):
        return None
    model = Model(begin, End())
    layout = family_named(model.family).layout("hf")
    left = {
        source.name: source.extent
        for source in begin.sources
        if not source.name.endswith(layout.ignored or ("\0",))
    }
    for group in layout.held(begin.parts):
        for entry in group.rules:
            model.messages[group.message] = {
                **model.messages.get(group.message, {}),
                **_fitting(Gatherer(layout, group.spec), group, entry, left),
            }
    if not any(model.messages.values()):
        return None
    return _Loaded(model, reason, left)


def _fitting(
    taker: Gatherer, group: RuleGroup, entry: Rule, left: dict[str, LazyTensor]
) -> Mapping[str, LazyTensor]:
    """Return the canonical tensors of a rule, and remove theirs; nothing if they do not fit."""
    shard = dict(left)
    try:
        found = taker.take([entry], [shard], group.layer)
    except (SchemaError, PlanError):
        return {}
    for name in left.keys() - shard.keys() if found else ():
        del left[name]
    return found


def _pair_misfits(loaded: tuple[_Loaded, _Loaded], notes: tuple[str, ...]) -> Paired:
    """Return both sides with canonical names where both have these, with their own elsewhere."""
    models = {side: one.model for side, one in zip("AB", loaded, strict=True)}
    notes += _same_vocabulary(models)
    sides = []
    for one, other in zip(loaded, loaded[::-1], strict=True):
        tensors = _canonical(one.model)
        own = one.own | _as_stored(one.model, tensors, other.own)
        sides.append(_side(one.model, tensors | _unschemed(own)))
    a, b = sides
    return Paired(a, b, notes)


def _as_stored(
    model: Model, canonical: dict[Name, LazyTensor], wanted: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Take out of ``canonical`` what the other side has under names of its own, so named."""
    named: dict[str, LazyTensor] = {}
    if model.passthrough is not None:
        return named
    layout = family_named(model.family).layout("hf")
    for group in layout.held(model.parts):
        message = model.messages.get(group.message, {})
        for entry in group.rules:
            if not all((group.message, key) in canonical for key in entry.keys):
                continue
            given = shard_tensors([entry], message, group.spec, group.layer)
            if wanted.keys() & given.keys():
                named |= given
                for key in entry.keys:
                    del canonical[group.message, key]
    return named


def _other_settings(left: Model, right: Model) -> Iterator[str]:
    """Yield a remark for each setting by which models with equal weights compute differently."""
    for part in left.begin.parts.keys() & right.begin.parts.keys():
        a, b = left.begin.parts[part], right.begin.parts[part]
        settings = [(name, getattr(a, name), getattr(b, name)) for name in _SETTINGS]
        window = "sliding_window"
        for name, one, other in (*settings, (window, a.extra.get(window), b.extra.get(window))):
            if one != other:
                yield (
                    f"the weights are compared, not the settings: {name} of the {part} model is "
                    f"{one} in A and {other} in B"
                )


def _left_out(models: Mapping[str, Model]) -> Iterator[str]:
    """Yield a remark for each reason for which tensors take no part in the comparison."""
    for side, model in models.items():
        reasons: dict[str, list[str]] = {}
        for drop in model.end.dropped:
            if drop.tensors:
                reasons.setdefault(drop.reason, []).append(drop.name)
        for reason, names in reasons.items():
            yield f"{side}: not compared: {listing(names, 3)}: {reason}"


def _same_use(models: Mapping[str, Model]) -> Iterator[str]:
    """Leave out of both sides what takes no part in the output, where only one has it."""
    if any("vision" not in model.begin.parts for model in models.values()):
        return
    left, right = (
        {name: set(one) for name, one in model.messages.items()} for model in models.values()
    )
    for side, model in models.items() if left != right else ():
        if unused := leave_unused(model, family_named(model.family)):
            size = sum(one.nbytes for one in unused)
            yield f"{side}: {len(unused)} tensors, {size:,} bytes, left out: {unused[0].reason}"


def _same_vocabulary(models: Mapping[str, Model]) -> tuple[str, ...]:
    """Cut the padding of both sides; the true size is what either of them says."""
    if any("language" not in model.begin.parts for model in models.values()):
        return ()
    sizes = {size for model in models.values() if (size := model.spec.vocab_size) is not None}
    if len(sizes) != 1:
        return ()
    (rows,) = sizes
    notes = []
    for side, model in models.items():
        for message, key in sorted(VOCAB_TENSORS):
            tensor = model.messages.get(message, {}).get(key)
            if tensor is not None and tensor.shape[0] > rows:
                cut = {key: tensor.narrow(0, 0, rows)}
                model.messages[message] = {**model.messages[message], **cut}
                padding = tensor.shape[0] - rows
                notes.append(f"{side}: {message}: {key}: {padding} rows of padding left out")
    return tuple(notes)


def _canonical(model: Model) -> dict[Name, LazyTensor]:
    return {
        (message, key): tensor
        for message, tensors in model.messages.items()
        for key, tensor in tensors.items()
    }


def _unschemed(tensors: Mapping[str, LazyTensor]) -> dict[Name, LazyTensor]:
    return {("", name): tensor for name, tensor in tensors.items()}


def _of_hugging_face(models: Mapping[str, Model]) -> tuple[Side, Side, tuple[str, ...]]:
    """Return two models under the names that Hugging Face's files have, and remarks.

    Of a model that no schema knows these are its own, in the spelling of files: releases of
    transformers have different names for one tensor, in memory and in files.
    """
    configs = [read_config(one.begin.sidecars, one.begin.root) for one in models.values()]
    config = next(filter(None, configs), {})
    remarks, sides = [], []
    for (side, model), own in zip(models.items(), configs, strict=True):
        if model.passthrough is None:
            layout = family_named(model.family).layout("hf")
            sides.append(_side(model, _unschemed(named_tensors(model, layout)[0])))
            continue
        tensors: Mapping[str, LazyTensor] = model.passthrough
        with suppress(CkptxError):  # names that do not fit stay as they are
            tensors = registry.in_files(tensors, own or config)
        if other := [name for name in model.passthrough if name not in tensors]:
            remarks.append(
                f"{side}: {len(other)} tensors are compared under the names that files have, "
                f"{other[0]!r} among them"
            )
        sides.append(_side(model, _unschemed(tensors)))
    a, b = sides
    return a, b, tuple(remarks)
