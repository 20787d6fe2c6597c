"""What savers share: the messages of a model held together, named, padded, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckptx.errors import PlanError, SchemaError, listing
from ckptx.model.family import Family
from ckptx.model.layout import Layout, Parts
from ckptx.model.sharding import check_message, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.protocol.messages import (
    PASSTHROUGH,
    VERSION,
    WEIGHT,
    Begin,
    Dropped,
    End,
    Message,
    Tensors,
)
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, LazyTensor, Replicated, Stored, replicated

VOCAB_TENSORS = {
    ("embeddings", "word embeddings"),
    ("output layer", "weight"),
    ("output layer", "bias"),
}
"""The canonical tensors whose first axis is the vocabulary, as (message, key)."""


@dataclass(slots=True)
class Model:
    """Everything a loader said of a model. Names of messages are unique over all its parts."""

    begin: Begin
    end: End
    messages: dict[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    passthrough: Mapping[str, LazyTensor] | None = None

    @property
    def spec(self) -> ModelSpec:
        """The dimensions of the language model."""
        if "language" not in self.begin.parts:
            raise SchemaError(
                f"the source ({'; '.join(self.end.notes) or self.begin.layout}) is of no known "
                "model family, so its tensors cannot change their layout; known families are "
                "listed by 'ckptx plugins'. Convert between formats that keep its names (--to hf, "
                "--to pytorch) or give --hf-base with a config"
            )
        return self.begin.parts["language"]

    @property
    def family(self) -> str:
        """The name of the family whose layouts hold the whole model."""
        return self.begin.family or self.spec.family

    @property
    def parts(self) -> Parts:
        """The dimensions of every part; there is a language model among them."""
        return {**self.begin.parts, "language": self.spec}


def collect(messages: Iterator[Message]) -> Model:
    """Return the model that the messages describe.

    Raises:
        PlanError: the messages are not in protocol order, or hold more than weights.
    """
    begin = next(messages, None)
    if not isinstance(begin, Begin):
        raise PlanError(f"the loader's first message is {type(begin).__name__}, expected Begin")
    if begin.version != VERSION:
        raise PlanError(f"the loader speaks protocol {begin.version}, this is {VERSION}")
    model = Model(begin, End())
    for message in messages:
        match message:
            case Tensors(name=name, tensors=tensors):
                check_state(message)
                if name == PASSTHROUGH:
                    model.passthrough = {**(model.passthrough or {}), **tensors}
                    continue
                if name in model.messages:
                    raise PlanError(f"the loader sent {name!r} twice")
                model.messages[name] = tensors
            case End():
                model.end = message
                return model
            case _:
                raise PlanError("the loader sent Begin twice")
    raise PlanError("the loader stopped before its End message")


def check_state(message: Tensors) -> None:
    """Raise unless a message holds weights, the one state that savers write.

    Raises:
        PlanError: it holds another state.
    """
    if message.state != WEIGHT:
        raise PlanError(
            f"the loader sent the state {message.state!r} of {message.name!r}; savers write "
            f"{WEIGHT!r} alone, so a loader declares any other state as dropped"
        )


def check_messages(model: Model, layout: Layout) -> None:
    """Raise unless the model's messages are exactly those that a layout can hold."""
    expected = {held.message: held.rules for held in layout.held(model.parts) if held.rules}
    missing = [name for name in expected if name not in model.messages]
    unknown = [name for name in model.messages if name not in expected]
    if missing or unknown:
        problems = [f"lacks {listing(missing)}"] * bool(missing)
        problems += [f"has {listing(unknown)}, which {layout.name} cannot hold"] * bool(unknown)
        raise SchemaError(f"the model {' and '.join(problems)}")
    for name, rules in expected.items():
        check_message(rules, model.messages[name], name, layout.name)


def leave_unused(model: Model, family: Family) -> tuple[Dropped, ...]:
    """Leave out what takes no part in the output of a model of several parts; return it.

    Raises:
        SchemaError: what is used cannot be told.
    """
    assert family.composition is not None  # there are several parts
    used = family.composition.used(model.parts)
    layout = family.layout("hf")
    kept = set(_keys(layout, used))
    dropped = []
    for message, key in set(_keys(layout, model.parts)) - kept:
        tensor = model.messages[message][key]
        label = f"{message}: {key}"
        reason = "behind the features that the language model sees"
        dropped.append(Dropped(label, reason, tensor.nbytes, (tensor,)))
        model.messages[message] = {
            name: one for name, one in model.messages[message].items() if name != key
        }
    model.messages = {name: tensors for name, tensors in model.messages.items() if tensors}
    model.begin = replace(model.begin, parts=used)
    return tuple(sorted(dropped, key=lambda one: one.name))


def fill_unused(model: Model, family: Family) -> tuple[str, ...]:
    """Add what a Hugging Face model must have although it takes no part in its output; say so."""
    if family.composition is None:
        return ()
    parts, lacking = family.composition.completed(model.parts)
    for (message, key), (shape, value) in lacking.items():
        filled = Filled(model.spec.dtype, shape, value)
        model.messages[message] = {**model.messages[message], key: filled}
    model.begin = replace(model.begin, parts=parts)
    return tuple(
        f"{message}: {key} takes no part in the output and the source has none: filled with {value}"
        for (message, key), (_, value) in lacking.items()
    )


def _keys(layout: Layout, parts: Parts) -> Iterator[tuple[str, str]]:
    """Yield message and key of every canonical tensor that a layout has of a model."""
    for held in layout.held(parts):
        for entry in held.rules:
            yield from ((held.message, key) for key in entry.keys)


def named_tensors(
    model: Model, layout: Layout
) -> tuple[dict[str, LazyTensor], tuple[Dropped, ...]]:
    """Return the whole model under a layout's names, without padding, and the padding dropped."""
    check_messages(model, layout)
    dropped = resize_vocabulary(model, model.spec.vocab_size, fill=False)
    named: dict[str, LazyTensor] = {}
    for held in layout.held(model.parts):
        named.update(shard_tensors(held.rules, model.messages[held.message], held.spec, held.layer))
    for message, key, name in layout.copies_of(model.spec):
        named[name] = model.messages[message][key]
    return named, dropped


def resize_vocabulary(model: Model, rows: int | None, *, fill: bool = True) -> tuple[Dropped, ...]:
    """Cut or extend the vocabulary of a model to ``rows``; None leaves it. Return the rows cut.

    New rows repeat the last one, as Megatron's converter makes them. Without ``fill`` a vocabulary
    that is too small is an error.

    Raises:
        SchemaError: rows are missing and must not be made up.
    """
    dropped = []
    for name, tensors in model.messages.items():
        changed = dict(tensors)
        for key, tensor in tensors.items():
            if rows is None or (name, key) not in VOCAB_TENSORS or tensor.shape[0] == rows:
                continue
            found = tensor.shape[0]
            if found > rows:
                changed[key] = tensor.narrow(0, 0, rows)
                cut = tensor.narrow(0, rows, found)
                label = f"{name}: {key!r} rows {rows} to {found - 1}"
                dropped.append(Dropped(label, "vocabulary padding", cut.nbytes, (cut,)))
            elif fill:
                changed[key] = _extended(tensor, rows - found)
            else:
                raise SchemaError(
                    f"{name}: {key!r} has {found} rows, the vocabulary is {rows}; the config or "
                    "--true-vocab-size does not belong to these weights"
                )
        model.messages[name] = changed
    return tuple(dropped)


def _extended(tensor: LazyTensor, count: int) -> LazyTensor:
    """Return a tensor with its last row repeated ``count`` times at its end."""
    if isinstance(tensor, Replicated):
        return replicated([_extended(copy, count) for copy in tensor.copies])
    last = tensor.narrow(0, tensor.shape[0] - 1, tensor.shape[0])
    if not isinstance(last, Stored):
        return concat([tensor, *[last] * count])
    shape = (count, *last.shape[1:])
    strides = (0, *last.strides[1:])
    return concat([tensor, Stored(last.dtype, shape, last.file, last.offset, strides)])
