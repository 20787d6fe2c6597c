"""Schemas: tables that say how a layout names the tensors of a model, read in both directions.

A rule ties canonical keys to names. An `Iso` packs the canonical tensors into the layout's and
unpacks them again; no schema author writes an inverse. Names are enumerated from the model's
dimensions, never matched, so what is missing and what is left over are set differences.

    rule(["mlp l0 weight W", "mlp l0 weight V"], "mlp.linear_fc1.weight", GLU, tp=0)
         canonical keys                           name in the layout      iso  axis cut by TP

Shards are cut in canonical space and packed afterwards: a rank's gated weight is
``GLU.pack([gate.chunk, up.chunk])``, which is what Megatron stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from ckptx.errors import PlanError, SchemaError, listing
from ckptx.lazy import (
    LazyTensor,
    Shape,
    concat,
    deinterleave,
    interleave,
    rejoin,
    replicated,
    stack,
    unstacked,
)
from ckptx.spec import ModelSpec
from ckptx.vocabulary import MTP_LAYER

Tensor: TypeAlias = LazyTensor
Predicate: TypeAlias = Callable[[ModelSpec], bool]
LayerPredicate: TypeAlias = Callable[[ModelSpec, int], bool]
Shard: TypeAlias = MutableMapping[str, LazyTensor]
Parts: TypeAlias = Mapping[str, ModelSpec]
"""Dimensions by part: ``"language"``, ``"vision"``, ``"projection"``."""


class Iso(Protocol):
    """A reversible rearrangement between canonical tensors and those of a layout.

    ``tp`` is the number of ranks the tensors are cut over; it scales the model's head counts.
    """

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the layout's tensors."""

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the canonical tensors."""

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        """Return where each canonical tensor lies: the packed tensor's number and an origin in it.

        Raises:
            SchemaError: the iso does not lay its tensors side by side.
        """


class _Same:
    """The layout holds the canonical tensors as they are."""

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return list(canonical)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return list(packed)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        return [(number, (0,) * len(shape)) for number, shape in enumerate(shapes)]


@dataclass(frozen=True, slots=True)
class _Glu:
    """Gate and up projection in one tensor, all gate rows first; rows lie along ``axis``."""

    axis: int = 0

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [concat(canonical, self.axis)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = packed
        half, odd = divmod(fused.shape[self.axis], 2)
        if odd:
            raise SchemaError(f"a gated weight of {fused.shape[self.axis]} rows has no two halves")
        return deinterleave(fused, [half, half], groups=1, axis=self.axis)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        gate, up = shapes
        second = tuple(gate[axis] if axis == self.axis else 0 for axis in range(len(up)))
        return [(0, (0,) * len(gate)), (0, second)]


@dataclass(frozen=True, slots=True)
class _Each:
    """One set of tensors per expert; canonical tensors have the experts on their first axis.

    Packed tensors run expert by expert, ``width`` for each, as names with ``{expert}`` do.
    """

    iso: Iso
    width: int

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed: list[Tensor] = []
        for own in zip(*map(unstacked, canonical), strict=True):
            packed += self.iso.pack([tensor.squeeze() for tensor in own], spec, tp)
        return packed

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        parts = [
            self.iso.unpack(packed[start : start + self.width], spec, tp)
            for start in range(0, len(packed), self.width)
        ]
        return [stack(tensors) for tensors in zip(*parts, strict=True)]

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("experts of their own do not lie side by side in one tensor")


@dataclass(frozen=True, slots=True)
class _Grouped:
    """All experts in one matrix, transposed: ``weight1``, ``weight2`` of Megatron's GroupedMLP.

    Memory holds one [in, out] matrix per expert after another. ``weight1`` is shaped as if they lay
    side by side, [in, experts * out], ``weight2`` as they do lie, [experts * in, out].

    Source: NVIDIA/Megatron-LM megatron/core/transformer/moe/experts.py, GroupedMLP @ core_v0.12.3.
    """

    iso: Iso
    side_by_side: bool

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed = self.iso.pack(canonical, spec, tp)
        joined = []
        for tensor in packed:
            experts, rows, _ = tensor.shape
            turned = tensor.permute((0, 2, 1)).merge(0)
            joined.append(turned.merge(0).split(0, experts * rows) if self.side_by_side else turned)
        return joined

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (tensor,) = packed
        rows = (spec.moe_ffn_hidden_size or 0) // tp  # of one expert in this shard
        if self.side_by_side:
            columns = rows * (2 if spec.gated else 1)
            tensor = tensor.merge(0).split(0, columns)
            experts = tensor.shape[0] // spec.hidden_size
            turned = tensor.split(0, tensor.shape[0] // experts)
        else:
            turned = tensor.split(0, rows)
        return self.iso.unpack([turned.permute((0, 2, 1))], spec, tp)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("grouped experts do not lie side by side as they are")


class _Qkv:
    """Query, key and value apart; canonical is fused, query group by query group.

    Source: NVIDIA/Megatron-LM megatron/core/transformer/attention.py, SelfAttention @ core_v0.16.1.
    """

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = canonical
        return deinterleave(fused, self._rows(spec, tp), spec.num_query_groups // tp)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        names = ("query", "key", "value")
        for name, part, rows in zip(names, packed, self._rows(spec, tp), strict=True):
            if part.shape[0] != rows:
                raise SchemaError(
                    f"the {name} has {part.shape[0]} rows, the config says {rows}; the config does "
                    "not belong to these weights"
                )
        return [interleave(packed, spec.num_query_groups // tp)]

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("separate query, key and value do not lie side by side in one tensor")

    def _rows(self, spec: ModelSpec, tp: int) -> list[int]:
        if spec.num_query_groups % tp:
            raise SchemaError(f"{spec.num_query_groups} query groups do not divide over {tp} ranks")
        key = spec.num_query_groups // tp * spec.kv_channels
        return [spec.num_attention_heads // tp * spec.kv_channels, key, key]


class _FusedQkv(_Qkv):
    """Query, key and value in one tensor: all heads of query, then of key, then of value.

    Source: huggingface/transformers src/transformers/models/{gpt2,phi3}/modeling_*.py @ v5.23.0.
    """

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [rejoin(super().pack(canonical, spec, tp))]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = packed
        rows = self._rows(spec, tp)
        if fused.shape[0] != sum(rows):
            raise SchemaError(
                f"query, key and value have {fused.shape[0]} rows, the config says {sum(rows)}"
            )
        return super().unpack(deinterleave(fused, rows, groups=1), spec, tp)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("query, key and value one after another are not in Megatron's order")


@dataclass(frozen=True, slots=True)
class Transposed:
    """What ``iso`` packs, each matrix stored as [in, out]: GPT-2's ``Conv1D``."""

    iso: Iso

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the layout's tensors, transposed."""
        return [self._turned(tensor) for tensor in self.iso.pack(canonical, spec, tp)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        """Return the canonical tensors of transposed ones."""
        return self.iso.unpack([self._turned(tensor) for tensor in packed], spec, tp)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        """Raise: no canonical tensor lies as it is in a transposed one."""
        raise SchemaError("a transposed tensor does not hold the canonical one as it is")

    def _turned(self, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 2:
            raise SchemaError(f"found {list(tensor.shape)} where a matrix is expected")
        return tensor.permute((1, 0))


class _RotaryPairs:
    """Query, key and value apart; those that rotate have another order of rows in every head.

    Canonical heads rotate row ``i`` with row ``i + d / 2``; here neighbours rotate together, so a
    head of ``d`` rows runs 0, d/2, 1, d/2 + 1, ...

    Source: meta-llama/llama llama/model.py, apply_rotary_emb @ main; huggingface/transformers
    src/transformers/models/llama/modeling_llama.py, rotate_half @ v5.23.0.
    """

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        query, key, value = canonical
        return [*(_turned(part, spec, spec.kv_channels // 2) for part in (query, key)), value]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        query, key, value = packed
        return [*(_turned(part, spec, 2) for part in (query, key)), value]

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("the rows of a rotary head do not lie side by side")


def _turned(part: Tensor, spec: ModelSpec, inner: int) -> Tensor:
    """Return heads seen as [d / inner, inner] rows with these two axes exchanged."""
    if spec.kv_channels % 2 or spec.rotary_percent != 1.0:
        raise SchemaError(
            f"heads of {spec.kv_channels} rows of which {spec.rotary_percent:g} rotate: only whole "
            "heads of even size have rotary pairs"
        )
    heads = part.split(0, spec.kv_channels).split(1, inner)
    rest = range(3, len(heads.shape))
    return heads.permute((0, 2, 1, *rest)).merge(1).merge(0)


@dataclass(frozen=True, slots=True)
class _Bare:
    """The layout leaves out so many axes of length 1 in front of each canonical tensor."""

    axes: int

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        packed = list(canonical)
        for _ in range(self.axes):
            packed = [tensor.squeeze() for tensor in packed]
        return packed

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        canonical = list(packed)
        for _ in range(self.axes):
            canonical = [tensor.unsqueeze() for tensor in canonical]
        return canonical

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("a tensor with fewer axes does not hold the canonical one as it is")


@dataclass(frozen=True, slots=True)
class _Chain:
    """One iso after the other: the second rearranges what the first has packed."""

    first: Iso
    second: Iso

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return self.second.pack(self.first.pack(canonical, spec, tp), spec, tp)

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return self.first.unpack(self.second.unpack(packed, spec, tp), spec, tp)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        raise SchemaError("tensors that were rearranged twice do not lie side by side")


SAME: Iso = _Same()
GLU: Iso = _Glu()
EXPERT_GLU: Iso = _Glu(axis=1)
"""Gate and up projections of experts in one tensor, [experts, rows, columns]."""
QKV: Iso = _Qkv()
FUSED_QKV: Iso = _FusedQkv()
ROTARY_PAIRS: Iso = _RotaryPairs()


def bare(axes: int) -> Iso:
    """Return the iso that leaves out ``axes`` axes of length 1 in front."""
    return _Bare(axes)


def chain(first: Iso, second: Iso) -> Iso:
    """Return the iso that packs with ``first`` and then with ``second``."""
    return _Chain(first, second)


GROUPED_FC1: Iso = _Grouped(EXPERT_GLU, side_by_side=True)
"""``weight1`` of Megatron's GroupedMLP, gated."""
GROUPED_FC2: Iso = _Grouped(SAME, side_by_side=False)
"""``weight2`` of Megatron's GroupedMLP."""


def each(iso: Iso = SAME, width: int = 1) -> Iso:
    """Return the iso of experts that have tensors of their own, under names with ``{expert}``.

    ``width`` is the number of names that each expert has.
    """
    return _Each(iso, width)


@dataclass(frozen=True, slots=True)
class Spelling:
    """Names that a layout may use for a rule's tensors.

    ``{layer}`` stands for the layer number, ``{expert}`` for the number of an expert in the shard.
    """

    names: tuple[str, ...]
    iso: Iso

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
            Spelling(tuple(other + name.removeprefix(prefix) for name in one.names), one.iso)
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
    iso: Iso = SAME,
    *,
    tp: int | None = None,
    ep: int | None = None,
    when: Predicate = always,
    layers: LayerPredicate | None = None,
    also: Sequence[tuple[str | Sequence[str], Iso] | str] = (),
    rows: Callable[[ModelSpec], int] | None = None,
) -> Rule:
    """Return a rule: canonical ``keys`` are stored under ``names``, arranged by ``iso``.

    ``tp`` is the canonical axis that tensor parallelism cuts, None for replicated. With ``ep``, the
    axis that expert parallelism cuts, ``tp`` is cut by expert-tensor parallelism instead. ``when``
    says for which models the rule holds, ``layers`` for which of their layers. ``also`` lists other
    spellings that loaders accept; the first is the one that savers write. ``rows`` is the number of
    rows of a tensor that some ranks hold whole and others cut along them: its shape tells which.
    """
    spellings = [Spelling(_tuple(names), iso)]
    for other in also:
        spellings.append(
            Spelling((other,), iso)
            if isinstance(other, str)
            else Spelling(_tuple(other[0]), other[1])
        )
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


@dataclass(frozen=True, slots=True)
class Held:
    """One message of a model of one or several parts, and the rules of what it holds."""

    part: str
    spec: ModelSpec
    """The dimensions of the part."""
    message: str
    layer: int | None
    rules: tuple[Rule, ...]


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

    def held(self, parts: Parts) -> Iterator[Held]:
        """Yield every message of a model of several parts, part by part, as `expand` does."""
        for part, spec in parts.items():
            sections = tuple(section for section in self.sections if section.part == part)
            for message, layer, rules in replace(self, sections=sections).expand(spec):
                yield Held(part, spec, message, layer, rules)

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


@dataclass(frozen=True, slots=True)
class Rank:
    """The coordinates of one rank in its pipeline stage, and the sizes they belong to."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of one pipeline stage, by what they hold.

    ``dense[tp_rank]`` are the copies of the dense tensors that expert-parallel ranks hold alike,
    ``experts[ep_rank][etp_rank]`` those of the experts. One shard may stand in both.
    """

    dense: Sequence[Sequence[Shard]]
    experts: Sequence[Sequence[Sequence[Shard]]]
    labels: Mapping[int, str] = field(default_factory=dict)
    """What goes before the names of a shard in messages, by the ``id`` of the shard."""

    @classmethod
    def of_ranks(cls, shards: Sequence[Shard]) -> Shards:
        """Return the shards of tensor-parallel ranks that are not expert-parallel."""
        ranks = [[shard] for shard in shards]
        return cls(ranks, [ranks])

    @classmethod
    def of_grid(
        cls, shards: Sequence[Shard], ranks: Sequence[Rank], labels: Sequence[str] = ()
    ) -> Shards:
        """Return the shards of a stage; ``shards[i]`` and ``labels[i]`` are of ``ranks[i]``."""
        size = ranks[0]
        dense: list[list[Shard]] = [[] for _ in range(size.tp)]
        experts: list[list[list[Shard]]] = [[[] for _ in range(size.etp)] for _ in range(size.ep)]
        for shard, rank in zip(shards, ranks, strict=True):
            dense[rank.tp_rank].append(shard)
            experts[rank.ep_rank][rank.etp_rank].append(shard)
        return cls(dense, experts, dict(zip(map(id, shards), labels, strict=False)))


class Taker:
    """Takes the tensors of messages out of shards, and knows what is missing and what is left.

    ``take`` removes what it uses from the shards' mappings. Names that were not found are
    collected, so that one error can list them all.
    """

    def __init__(self, layout: Layout, spec: ModelSpec) -> None:
        self.layout = layout
        self.spec = spec
        self.missing: list[str] = []

    def of(self, spec: ModelSpec) -> Taker:
        """Return a taker for a part of these dimensions; what it does not find is missing here."""
        other = Taker(self.layout, spec)
        other.missing = self.missing
        return other

    def take(
        self,
        rules: Sequence[Rule],
        shards: Shards | Sequence[Shard],
        layer: int | None = None,
        label: str = "",
    ) -> dict[str, Tensor]:
        """Return the canonical tensors that rules find in the shards of a stage.

        A plain sequence of shards is one per tensor-parallel rank. ``layer`` is the number that
        the shards use; ``label`` goes before names in messages.
        """
        if not isinstance(shards, Shards):
            shards = Shards.of_ranks(shards)
        message: dict[str, Tensor] = {}
        for entry in rules:
            groups = [shards.dense] if entry.ep is None else shards.experts
            experts = (self.spec.num_experts or 0) // len(groups)
            names, iso = _present(entry, groups[0][0][0], layer, experts)
            missing = [
                shards.labels.get(id(shard), label) + name
                for group in groups
                for copies in group
                for shard in copies
                for name in names
                if name not in shard
            ]
            if missing:
                self.missing += dict.fromkeys(missing)
                for shard in (s for group in groups for copies in group for s in copies):
                    for name in names:  # the others are known, and of no use alone
                        shard.pop(name, None)
                continue
            parts = [self._unpacked(names, iso, group, label) for group in groups]
            place = label + names[0]
            for number, key in enumerate(entry.keys):
                joined = [
                    _joined([part[number] for part in ranks], self._cut(entry, ranks), place)
                    for ranks in parts
                ]
                message[key] = concat(joined, entry.ep) if entry.ep is not None else joined[0]
        return message

    def _unpacked(
        self, names: Sequence[str], iso: Iso, ranks: Sequence[Sequence[Shard]], label: str
    ) -> list[list[Tensor]]:
        """Return the canonical parts of each tensor-parallel rank; its copies are one."""
        parts = []
        for copies in ranks:
            try:
                packed = [replicated([shard.pop(name) for shard in copies]) for name in names]
                parts.append(iso.unpack(packed, self.spec, len(ranks)))
            except (SchemaError, PlanError) as error:
                raise SchemaError(f"{label}{_some(names)}: {error}") from error
        return parts

    def _cut(self, entry: Rule, ranks: Sequence[Sequence[Tensor]]) -> int | None:
        """Return the axis along which ranks hold parts of a tensor, None if each holds all."""
        if entry.rows is not None and ranks[0][0].shape[0] < entry.rows(self.spec):
            return 0
        return entry.tp

    def finish(self, left: Sequence[str]) -> None:
        """Raise a SchemaError that names what is missing and what was not used, if anything."""
        problems = []
        if self.missing:
            problems.append(f"{_counted(self.missing)} missing: {listing(self.missing)}")
        if left:
            problems.append(f"{_counted(left)} not part of it: {listing(left)}")
        if problems:
            raise SchemaError(f"layout {self.layout.name}: {'; '.join(problems)}")


def give(
    rules: Sequence[Rule],
    message: Mapping[str, Tensor],
    spec: ModelSpec,
    layer: int | None = None,
    rank: Rank | None = None,
    shares: MutableMapping[Any, Any] | None = None,
) -> dict[str, Tensor]:
    """Return, by name, what a rank holds of a message; everything without a rank.

    Ranks that hold the same get the very same tensors where they come with the same ``shares``,
    which belong to the ranks of one pipeline chunk.
    """
    rank = rank or Rank()
    known: MutableMapping[Any, Any] = {} if shares is None else shares
    named: dict[str, Tensor] = {}
    for entry in rules:
        share = (id(message), id(entry), *_coordinates(entry, rank))
        if share not in known:
            spelling = entry.spellings[0]
            cut = [_piece(message[key], entry, rank, key, known) for key in entry.keys]
            packed = spelling.iso.pack(cut, spec, rank.tp if entry.ep is None else rank.etp)
            experts = cut[0].shape[entry.ep] if entry.ep is not None else 0
            known[share] = dict(zip(spelling.named(layer, experts), packed, strict=True))
        named.update(known[share])
    return named


def _coordinates(entry: Rule, rank: Rank) -> tuple[int, ...]:
    """Return the coordinates of a rank that say which part of a rule's tensors it holds."""
    if entry.ep is not None:
        return rank.ep_rank, rank.etp_rank
    return () if entry.tp is None else (rank.tp_rank,)


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


class Placed(NamedTuple):
    """A canonical piece in a global tensor: the chunk grid of ``torch_dist``."""

    name: str
    global_shape: Shape
    origin: Shape
    tensor: Tensor


def place(
    rules: Sequence[Rule],
    message: Mapping[str, Tensor],
    spec: ModelSpec,
    layer: int | None,
    ranks: Sequence[Rank],
) -> Iterator[tuple[int, Placed]]:
    """Yield every chunk of the layout's global tensors once, with the first rank that holds it.

    ``ranks`` are those of a pipeline stage; a chunk comes with its rank's place among them. Every
    expert is a chunk of its own: a chunk is read whole by who needs any of it.
    """
    size = ranks[0]
    dense: dict[int, int] = {}
    experts: dict[tuple[int, int], int] = {}
    for number, rank in enumerate(ranks):
        dense.setdefault(rank.tp_rank, number)
        experts.setdefault((rank.ep_rank, rank.etp_rank), number)
    for entry in rules:
        spelling = entry.spellings[0]
        whole = [message[key] for key in entry.keys]
        packed = spelling.iso.pack(whole, spec, 1)
        origins = spelling.iso.origins([tensor.shape for tensor in whole])
        names = spelling.named(layer, 0)
        for key, full, (number, at) in zip(entry.keys, whole, origins, strict=True):
            name, shape = names[number], packed[number].shape
            if entry.ep is None:
                for tp_rank, (shift, piece) in enumerate(_cut(full, entry.tp, size.tp, key)):
                    yield dense[tp_rank], Placed(name, shape, _moved(at, entry.tp, shift), piece)
                continue
            if full.shape[entry.ep] % size.ep:
                raise _undivided(key, full, entry.ep, size.ep, "expert-parallel")
            each = full.shape[entry.ep] // size.ep
            for expert, one in enumerate(unstacked(full)):
                here = _moved(at, entry.ep, expert)
                parts = _cut(one, entry.tp, size.etp, key, "expert-tensor-parallel")
                for etp_rank, (shift, piece) in enumerate(parts):
                    owner = experts[expert // each, etp_rank]
                    yield owner, Placed(name, shape, _moved(here, entry.tp, shift), piece)


def _cut(
    tensor: Tensor, axis: int | None, parts: int, key: str, kind: str = "tensor-parallel"
) -> Iterator[tuple[int, Tensor]]:
    """Yield the equal parts of a tensor along an axis, and where each starts."""
    if axis is None or parts == 1:
        yield 0, tensor
        return
    if tensor.shape[axis] % parts:
        raise _undivided(key, tensor, axis, parts, kind)
    length = tensor.shape[axis] // parts
    for number, part in enumerate(tensor.chunks(axis, parts)):
        yield number * length, part


def _moved(origin: Shape, axis: int | None, shift: int) -> Shape:
    if axis is None or not shift:
        return origin
    return (*origin[:axis], origin[axis] + shift, *origin[axis + 1 :])


def _undivided(key: str, tensor: Tensor, axis: int, size: int, kind: str) -> PlanError:
    return PlanError(
        f"{key!r} {list(tensor.shape)} does not divide over {kind} size {size} along axis {axis}"
    )


def check_message(
    rules: Sequence[Rule], message: Mapping[str, Tensor], name: str, layout: str
) -> None:
    """Raise a SchemaError unless a message holds exactly the keys that a layout's rules name."""
    expected = {key for entry in rules for key in entry.keys}
    missing, unknown = sorted(expected - set(message)), sorted(set(message) - expected)
    if missing or unknown:
        problems = [f"lacks {listing(missing)}"] * bool(missing)
        problems += [f"has {listing(unknown)}, which {layout} cannot hold"] * bool(unknown)
        raise SchemaError(f"message {name!r} {' and '.join(problems)}")


@dataclass(frozen=True, slots=True)
class Composition:
    """How the parts of a model of several parts are described together."""

    from_config: Callable[[Mapping[str, Any]], Parts]
    to_config: Callable[[Parts], dict[str, Any]]
    differences: Callable[[Mapping[str, Any], Parts], list[str]]
    """One line per key in which a config contradicts the parts."""
    merge_config: Callable[[Mapping[str, Any], Parts], dict[str, Any]]
    """Return a config in which the parts win where both speak."""
    used: Callable[[Parts], Parts]
    """Return the parts without what takes no part in the model's output."""
    completed: Callable[[Parts], tuple[Parts, Mapping[tuple[str, str], tuple[Shape, float]]]]
    """Return the parts with what a Hugging Face model must have and does not use.

    Where the parts lack it, there is a shape and a value by message and key to fill it with."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model architecture: the layouts it has, and how its Hugging Face config reads.

    ``to_config`` returns a complete ``config.json`` for models whose own is not at hand.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    layouts: Mapping[str, Layout]
    """By convention: ``"hf"``, ``"mcore"``, ``"meta"``."""
    from_config: Callable[[Mapping[str, Any]], ModelSpec]
    to_config: Callable[[ModelSpec], dict[str, Any]]
    proof: Mapping[str, str] = field(default_factory=dict)
    """For the support matrix: what proves each layout."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """By convention: why the family cannot have that layout."""
    composition: Composition | None = None
    """For a model of several parts; `from_config` and `to_config` are then of its language part."""
    limits: tuple[str, ...] = ()
    """For the support matrix: which models of the family cannot be converted, or need a hand."""

    def layout(self, convention: str) -> Layout:
        """Return the layout of a convention (``"hf"``, ``"mcore"``).

        Raises:
            SchemaError: the family has none.
        """
        if convention not in self.layouts:
            reason = self.refused.get(convention, "its tensors cannot be named that way")
            raise SchemaError(
                f"family {self.name} has no {convention} layout, only "
                f"{', '.join(sorted(self.layouts))}: {reason}"
            )
        return self.layouts[convention]


def _present(
    entry: Rule, shard: Mapping[str, Tensor], layer: int | None, experts: int
) -> tuple[tuple[str, ...], Iso]:
    """Return the first spelling that the shard has, else the first of all."""
    for spelling in entry.spellings:
        names = spelling.named(layer, experts)
        if all(name in shard for name in names):
            return names, spelling.iso
    return entry.spellings[0].named(layer, experts), entry.spellings[0].iso


def _some(names: Sequence[str]) -> str:
    """Return the names of a rule; of many experts', the first few."""
    more = len(names) - 3
    return ", ".join(names[:3]) + f" and {more} more" * (more > 0)


def _joined(copies: Sequence[Tensor], tp: int | None, name: str) -> Tensor:
    shapes = list(dict.fromkeys(copy.shape for copy in copies))
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in shapes)
        raise SchemaError(
            f"{name}: tensor-parallel ranks do not fit together: they hold {found}, expected equal "
            "shapes; their files are not of one checkpoint"
        )
    try:
        return replicated(copies) if tp is None else concat(copies, tp)
    except PlanError as error:
        raise SchemaError(f"{name}: tensor-parallel ranks do not fit together: {error}") from error


def _piece(
    tensor: Tensor, entry: Rule, rank: Rank, key: str, known: MutableMapping[Any, Any]
) -> Tensor:
    """Return the part of a canonical tensor that a rank holds; ``known`` keeps experts apart."""
    tp, tp_rank, kind = rank.tp, rank.tp_rank, "tensor-parallel"
    if entry.ep is not None:
        tp, tp_rank, kind = rank.etp, rank.etp_rank, "expert-tensor-parallel"
    if entry.ep is not None and rank.ep > 1:
        if tensor.shape[entry.ep] % rank.ep:
            raise _undivided(key, tensor, entry.ep, rank.ep, "expert-parallel")
        if id(tensor) not in known:
            known[id(tensor)] = unstacked(tensor)
        held = tensor.shape[entry.ep] // rank.ep
        tensor = concat(known[id(tensor)][rank.ep_rank * held : (rank.ep_rank + 1) * held])
    if entry.tp is None or tp == 1:
        return tensor
    if tensor.shape[entry.tp] % tp:
        raise _undivided(key, tensor, entry.tp, tp, kind)
    return tensor.chunk(entry.tp, tp, tp_rank)


def _counted(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
