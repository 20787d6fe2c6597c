"""Schemas: tables that say how a layout names the tensors of a model, read in both directions.

A rule ties canonical keys to names. A `Transform` packs the canonical tensors into the layout's
and unpacks them again; no schema author writes an inverse. Names are enumerated from the model's
dimensions, never matched, so what is missing and what is left over are set differences.

    rule(["mlp l0 weight W", "mlp l0 weight V"], "mlp.linear_fc1.weight", GLU, tp=0)
         canonical keys                           name in the layout   transform  axis cut by TP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ckptx.model.canonical_names import MTP_LAYER
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import IDENTITY, Transform

Predicate: TypeAlias = Callable[[ModelSpec], bool]
LayerPredicate: TypeAlias = Callable[[ModelSpec, int], bool]
Parts: TypeAlias = Mapping[str, ModelSpec]
"""Dimensions by part: ``"language"``, ``"vision"``, ``"projection"``."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """Names that a layout may use for a rule's tensors.

    ``{layer}`` stands for the layer number, ``{expert}`` for the number of an expert in the shard.
    """

    names: tuple[str, ...]
    transform: Transform

    def named(self, layer: int | None, experts: int) -> tuple[str, ...]:
        """Return the names in one layer of a shard with so many experts, expert by expert."""
        names = self.names
        if layer is not None:
            names = tuple(name.replace("{layer}", str(layer)) for name in names)
        if not any("{expert}" in name for name in names):
            return names
        return tuple(name.replace("{expert}", str(e)) for e in range(experts) for name in names)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a layout; see `rule`."""

    keys: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    tp: int | None
    when: Predicate
    ep: int | None = None
    layers: LayerPredicate | None = None
    rows: Callable[[ModelSpec], int] | None = None

    def only_in(self, layers: LayerPredicate) -> Rule:
        """Return the rule for some of the layers."""
        return replace(self, layers=layers)

    def under(self, prefix: str, *others: str) -> Rule:
        """Return the rule with names that begin with others instead of ``prefix``.

        Each spelling comes with the first of them, then each with the second, and so on.
        """
        moved = tuple(
            Spelling(tuple(other + name.removeprefix(prefix) for name in one.names), one.transform)
            for other in others
            for one in self.spellings
        )
        return replace(self, spellings=moved)


def always(spec: ModelSpec) -> bool:
    """Return True: the rule applies to every model of the layout."""
    return True


def rule(
    keys: str | Sequence[str],
    names: str | Sequence[str],
    transform: Transform = IDENTITY,
    *,
    tp: int | None = None,
    ep: int | None = None,
    when: Predicate = always,
    layers: LayerPredicate | None = None,
    also: Sequence[tuple[str | Sequence[str], Transform] | str] = (),
    rows: Callable[[ModelSpec], int] | None = None,
) -> Rule:
    """Return a rule: canonical ``keys`` are stored under ``names``, arranged by ``transform``.

    ``tp`` is the canonical axis that tensor parallelism cuts, None for replicated. With ``ep``, the
    axis that expert parallelism cuts, ``tp`` is cut by expert-tensor parallelism instead. ``when``
    says for which models the rule holds, ``layers`` for which of their layers. ``also`` lists other
    spellings that loaders accept; the first is the one that savers write. ``rows`` is the number of
    rows of a tensor that some ranks hold whole and others cut along them: its shape tells which.
    """
    others = [(other, transform) if isinstance(other, str) else other for other in also]
    spellings = (Spelling(_tuple(own), how) for own, how in ((names, transform), *others))
    return Rule(_tuple(keys), tuple(spellings), tp, when, ep, layers, rows)


@dataclass(frozen=True, slots=True)
class Section:
    """The rules of one message; ``transformer layer {layer}`` stands for one message per layer.

    ``mtp layer {layer}`` stands for those of multi-token prediction; names number them from 0, or
    with ``numbered_on`` from the number of layers before.
    """

    message: str
    rules: tuple[Rule, ...]
    numbered_on: bool = False
    part: str = "language"
    """The part of the model that the message is of, and whose dimensions it has."""

    def layers(self, spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
        """Yield message, number in names and place in the model of every layer, if it has them."""
        if "{layer}" not in self.message:
            return
        further = self.message.startswith(MTP_LAYER)
        first, count = (spec.num_layers, spec.mtp_num_layers) if further else (0, spec.num_layers)
        for layer in range(count):
            number = first + layer if self.numbered_on else layer
            yield self.message.format(layer=layer), number, first + layer

    @property
    def per_layer(self) -> bool:
        """Whether the section repeats for layers."""
        return "{layer}" in self.message

    def under(self, prefix: str, *others: str) -> Section:
        """Return the section with names that begin with others instead of ``prefix``."""
        return replace(self, rules=tuple(entry.under(prefix, *others) for entry in self.rules))


def sections(rules: Mapping[str, tuple[Rule, ...]]) -> tuple[Section, ...]:
    """Return the sections of a language model, given the rules of its messages."""
    return tuple(Section(message, own) for message, own in rules.items())


@dataclass(frozen=True, slots=True)
class RuleGroup:
    """One message of a model of one or several parts, and the rules of what it holds."""

    part: str
    spec: ModelSpec
    """The dimensions of the part."""
    message: str
    layer: int | None
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class ExtraState:
    """A module that keeps an ``_extra_state``: quantisation state, empty without fp8.

    Transformer Engine's modules hold an empty byte tensor, Megatron's own hold None. Loading at
    Megatron's default strictness misses every state that its model has and a checkpoint has not.
    """

    message: str
    module: str
    """``{expert}`` in it stands for one module per expert."""
    engine: bool
    """Whether it is Transformer Engine's, so that its value is a tensor."""
    when: Predicate = always
    layers: LayerPredicate | None = None
    sharded_by_expert: bool = False
    """Whether ``torch_dist`` holds one state per expert under one name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one convention names the tensors of a model; sections in the model's own order."""

    name: str
    sections: tuple[Section, ...]
    ignored: tuple[str, ...] = ()
    """Endings of names that carry no weights (``"rotary_emb.inv_freq"``), dropped with a reason."""
    copies: tuple[tuple[str, str, str], ...] = ()
    """Names under which the layers of multi-token prediction repeat a tensor, as ``(message, key,
    name)``; they are written, and where they are read compared."""

    repeated: tuple[tuple[str, str, str], ...] = ()
    """Further names that some files have for a tensor, in the same way; compared, not written."""
    extra_states: tuple[ExtraState, ...] = ()
    """The modules that keep an extra state in Megatron."""

    def expand(self, spec: ModelSpec) -> Iterator[tuple[str, int | None, tuple[Rule, ...]]]:
        """Yield ``(message, layer, rules)`` for every message of a model, in model order.

        ``layer`` is the number in names, None for a message that is not of a layer.
        """
        for section in self.sections:
            rules = tuple(entry for entry in section.rules if entry.when(spec))
            for message, number, place in section.layers(spec):
                held = tuple(r for r in rules if r.layers is None or r.layers(spec, place))
                yield message, number, held
            if rules and not section.per_layer:
                yield section.message, None, rules

    def copies_of(self, spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
        """Yield message, key and name of every tensor that the layout holds once more."""
        for message, key, name in self.copies:
            if spec.tied and message == "output layer":
                message, key = "embeddings", "word embeddings"
            for layer in range(spec.mtp_num_layers):
                yield message, key, name.replace("{layer}", str(spec.num_layers + layer))

    def held(self, parts: Parts) -> Iterator[RuleGroup]:
        """Yield every message of a model of several parts, part by part, as `expand` does."""
        for part, spec in parts.items():
            sections = tuple(section for section in self.sections if section.part == part)
            for message, layer, rules in replace(self, sections=sections).expand(spec):
                yield RuleGroup(part, spec, message, layer, rules)

    def names_of(self, message: str, key: str) -> tuple[str, ...]:
        """Return the names, in any spelling, of a canonical tensor that is stored by itself.

        Rules that depend on the model's dimensions count too.
        """
        return tuple(
            spelling.names[0]
            for section in self.sections
            for entry in section.rules
            for spelling in entry.spellings
            if section.message == message and entry.keys == (key,) and len(spelling.names) == 1
        )

    def names(self, spec: ModelSpec) -> list[str]:
        """Return the names of a whole model's tensors, in the order a module registers them."""
        return in_module_order(
            name
            for _, layer, rules in self.expand(spec)
            for entry in rules
            for name in entry.spellings[0].named(layer, spec.num_experts or 0)
        )


def in_module_order(names: Iterable[str]) -> list[str]:
    """Return names as a tree of modules has them: each module whole, at its first appearance.

    Rules name one kind of tensor of all experts, or of query, key and value, after another.

    Examples:
        >>> in_module_order(["0.fc1.weight", "1.fc1.weight", "0.fc2.weight", "1.fc2.weight"])
        ['0.fc1.weight', '0.fc2.weight', '1.fc1.weight', '1.fc2.weight']
    """
    tree: dict[str, Any] = {}
    for name in names:
        *modules, parameter = name.split(".")
        place = tree
        for module in modules:
            place = place.setdefault(f"{module}.", {})
        place[parameter] = name
    return list(_leaves(tree))


def _leaves(tree: Mapping[str, Any]) -> Iterator[str]:
    for entry in tree.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _leaves(entry)


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
