"""What loaders share: from named tensors to messages, without losing one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace

from ckptx.errors import CkptxError, SchemaError
from ckptx.model.canonical_names import check_shapes
from ckptx.model.layout import Layout, Parts, RuleGroup
from ckptx.model.sharding import Gatherer
from ckptx.model.spec import ModelSpec
from ckptx.protocol.context import ANYTHING, Context
from ckptx.protocol.messages import PASSTHROUGH, Begin, Dropped, End, Message, SourceTensor, Tensors
from ckptx.storage.blocks import equal
from ckptx.tensors.lazy import LazyTensor, replicated


def inventory(tensors: Mapping[str, LazyTensor], label: str = "") -> tuple[SourceTensor, ...]:
    """Return the declaration of source tensors; ``label`` goes before their names."""
    return tuple(SourceTensor(label + name, tensor) for name, tensor in tensors.items())


def messages_of(
    layout: Layout, tensors: Mapping[str, LazyTensor], spec: ModelSpec | Parts
) -> Iterator[Tensors]:
    """Yield the messages of a model whose tensors are whole, in model order.

    ``spec`` are the dimensions of its one part, or those of each.

    Raises:
        SchemaError: a tensor is missing, left over, or of another shape than the spec says.
    """
    parts = {"language": spec} if isinstance(spec, ModelSpec) else spec
    for message in gathered(layout, tensors, parts):
        check_shapes(message.name, message.tensors, parts[message.part])
        yield message


def gathered(layout: Layout, tensors: Mapping[str, LazyTensor], parts: Parts) -> Iterator[Tensors]:
    """Yield what `messages_of` yields, of any shapes.

    Raises:
        SchemaError: a tensor is missing or left over.
    """
    left = dict(tensors)
    taker = Gatherer(layout, parts["language"])
    found: dict[str, tuple[RuleGroup, dict[str, LazyTensor]]] = {}
    for held in layout.held(parts):
        if canonical := taker.of(held.spec).take(held.rules, [left], held.layer):
            found[held.message] = held, canonical
    for message, key, name in (*layout.copies_of(parts["language"]), *layout.repeated):
        if name in left and message in found and key in found[message][1]:
            own = found[message][1]
            own[key] = replicated([own[key], left.pop(name)])
    taker.finish(list(left))
    for message, (held, canonical) in found.items():
        yield Tensors(message, canonical, held.part)


def passthrough(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """Return the message that carries tensors under their own names."""
    return Tensors(PASSTHROUGH, dict(tensors))


def drop_ignored(layout: Layout, tensors: MutableMapping[str, LazyTensor]) -> tuple[Dropped, ...]:
    """Remove the tensors that a layout ignores and return what was removed."""
    dropped = []
    for name in [name for name in tensors if name.endswith(layout.ignored)]:
        tensor = tensors.pop(name)
        reason = "no weights: the model makes it anew"
        dropped.append(Dropped(name, reason, tensor.nbytes, (tensor,)))
    return tuple(dropped)


def resolve_tie(
    tensors: MutableMapping[str, LazyTensor], embedding: str, output: str, files: Sequence[str]
) -> tuple[bool, tuple[Dropped, ...], tuple[str, ...]]:
    """Decide what a tied model with an output weight of its own is.

    Returns:
        Whether it is tied, what was dropped, and remarks. Equal copies are one tensor; a
        differing one was trained and is kept: the model is not tied, whatever its config says.
    """
    if output not in tensors or embedding not in tensors:
        return True, (), ()
    if not equal(tensors[embedding], tensors[output], files):
        note = (
            f"the config ties the embeddings, but {output!r} differs from {embedding!r}: both are "
            "kept and the model is no longer tied"
        )
        return False, (), (note,)
    copy = tensors.pop(output)
    reason = f"tied: equal to {embedding!r}, byte for byte"
    return True, (Dropped(output, reason, copy.nbytes, (copy,)),), ()


def main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """Return the dtype that holds most bytes."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    if not sizes:
        raise SchemaError("there is no tensor")
    return sizes.most_common(1)[0][0]


def begin_anyway(begin: Begin, messages: Iterator[Message], context: Context) -> Iterator[Message]:
    """Yield messages; if there is none because a schema does not fit, ``begin`` before the error.

    So a checkpoint that cannot be converted can still be looked at: its files, and what they hold.

    Raises:
        CkptxError: what ``messages`` raises.
    """
    begun = False
    try:
        for message in messages:
            begun = True
            yield message
    except CkptxError:
        if not begun and context.wants == ANYTHING:
            yield begin
        raise


def named_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    spec: ModelSpec | Parts,
    layout: Layout,
    notes: tuple[str, ...] = (),
    dropped: tuple[Dropped, ...] = (),
) -> Iterator[Message]:
    """Yield the messages of a model of known dimensions whose tensors have the names of a layout.

    ``spec`` are the dimensions of its one part, or those of each. ``notes`` and ``dropped`` go
    before others.

    Raises:
        SchemaError: tensors are missing, left over, or not of the shapes that the spec says.
    """
    dtype = main_dtype(tensors)
    said = {"language": spec} if isinstance(spec, ModelSpec) else spec
    parts = {part: replace(one, dtype=dtype) for part, one in said.items()}
    spec = parts["language"]
    left = dict(tensors)
    dropped = (*dropped, *drop_ignored(layout, left))
    if spec.mtp_num_layers and not mtp_names(layout, spec) & set(left):
        note = (
            f"the config says {spec.mtp_num_layers} layers for multi-token prediction, the weights "
            "hold none, as transformers saves them: the model is converted without"
        )
        spec, notes = replace(spec, mtp_num_layers=0), (*notes, note)
    if spec.tied:
        tied, copies, remarks = resolve_tie(left, *tied_names(layout, left), begin.files)
        spec, dropped, notes = replace(spec, tied=tied), (*dropped, *copies), (*notes, *remarks)
    parts = {**parts, "language": spec}
    yield replace(begin, layout=layout.name, parts=parts)
    yield from messages_of(layout, left, parts)
    yield End(dropped, notes)


def names_held(held: RuleGroup) -> set[str]:
    """Return the names, in any spelling, of all tensors of a message."""
    experts = held.spec.num_experts or 0
    return {
        name
        for entry in held.rules
        for spelling in entry.spellings
        for name in spelling.named(held.layer, experts)
    }


def mtp_names(layout: Layout, spec: ModelSpec) -> set[str]:
    """Return the names that the layers for multi-token prediction have in a layout."""
    without = replace(spec, mtp_num_layers=0)
    copies = {name for _, _, name in layout.copies_of(spec)}
    return copies | set(layout.names(spec)) - set(layout.names(without))


def tied_names(layout: Layout, tensors: Mapping[str, LazyTensor]) -> tuple[str, str]:
    """Return the names that a layout has for the embedding and the output layer of a model."""
    embedding = name_among(tensors, layout, "embeddings", "word embeddings")
    return embedding, name_among(tensors, layout, "output layer", "weight")


def name_among(tensors: Collection[str], layout: Layout, message: str, key: str) -> str:
    """Return a canonical tensor's name that is among ``tensors``, else the one that is preferred.

    A layout may have several, as of transformers 4 and 5; or none: then it is empty.
    """
    names = layout.names_of(message, key)
    return next((name for name in names if name in tensors), next(iter(names), ""))
