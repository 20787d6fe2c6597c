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

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ckptx.errors import PlanError, SchemaError, listing
from ckptx.lazy import LazyTensor, Shape, concat, deinterleave, interleave, rejoin, replicated
from ckptx.spec import ModelSpec

Tensor: TypeAlias = LazyTensor
Predicate: TypeAlias = Callable[[ModelSpec], bool]


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


class _Glu:
    """Gate and up projection in one tensor, all gate rows first."""

    def pack(self, canonical: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        return [concat(canonical)]

    def unpack(self, packed: Sequence[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
        (fused,) = packed
        half, odd = divmod(fused.shape[0], 2)
        if odd:
            raise SchemaError(f"a gated weight of {fused.shape[0]} rows has no two halves")
        return deinterleave(fused, [half, half], groups=1)

    def origins(self, shapes: Sequence[Shape]) -> list[tuple[int, Shape]]:
        gate, up = shapes
        return [(0, (0,) * len(gate)), (0, (gate[0], *(0,) * (len(up) - 1)))]


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
QKV: Iso = _Qkv()
FUSED_QKV: Iso = _FusedQkv()
ROTARY_PAIRS: Iso = _RotaryPairs()


def chain(first: Iso, second: Iso) -> Iso:
    """Return the iso that packs with ``first`` and then with ``second``."""
    return _Chain(first, second)


@dataclass(frozen=True, slots=True)
class Spelling:
    """Names that a layout may use for a rule's tensors; ``{layer}`` stands for the layer number."""

    names: tuple[str, ...]
    iso: Iso


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a layout; see `rule`."""

    keys: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    tp: int | None
    when: Predicate


def always(spec: ModelSpec) -> bool:
    """Return True: the rule applies to every model of the layout."""
    return True


def rule(
    keys: str | Sequence[str],
    names: str | Sequence[str],
    iso: Iso = SAME,
    *,
    tp: int | None = None,
    when: Predicate = always,
    also: Sequence[tuple[str | Sequence[str], Iso] | str] = (),
) -> Rule:
    """Return a rule: canonical ``keys`` are stored under ``names``, arranged by ``iso``.

    ``tp`` is the canonical axis that tensor parallelism cuts, None for replicated. ``also`` lists
    other spellings that loaders accept; the first is the one that savers write.
    """
    spellings = [Spelling(_tuple(names), iso)]
    for other in also:
        spellings.append(
            Spelling((other,), iso)
            if isinstance(other, str)
            else Spelling(_tuple(other[0]), other[1])
        )
    return Rule(_tuple(keys), tuple(spellings), tp, when)


@dataclass(frozen=True, slots=True)
class Section:
    """The rules of one message; ``transformer layer {layer}`` stands for one message per layer."""

    message: str
    rules: tuple[Rule, ...]

    @property
    def per_layer(self) -> bool:
        """Whether the section repeats for every layer."""
        return "{layer}" in self.message


@dataclass(frozen=True, slots=True)
class Layout:
    """How one convention names the tensors of a model part; sections in the model's own order."""

    name: str
    sections: tuple[Section, ...]
    ignored: tuple[str, ...] = ()
    """Endings of names that carry no weights (``"rotary_emb.inv_freq"``), dropped with a reason."""

    def expand(self, spec: ModelSpec) -> Iterator[tuple[str, int | None, tuple[Rule, ...]]]:
        """Yield ``(message, layer, rules)`` for every message of a model, in model order."""
        for section in self.sections:
            rules = tuple(entry for entry in section.rules if entry.when(spec))
            if section.per_layer:
                for layer in range(spec.num_layers):
                    yield section.message.format(layer=layer), layer, rules
            elif rules:
                yield section.message, None, rules

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


class Taker:
    """Takes the tensors of messages out of shards, and knows what is missing and what is left.

    ``take`` removes what it uses from the shards' mappings. Names that were not found are
    collected, so that one error can list them all.
    """

    def __init__(self, layout: Layout, spec: ModelSpec) -> None:
        self.layout = layout
        self.spec = spec
        self.missing: list[str] = []

    def take(
        self,
        rules: Sequence[Rule],
        shards: Sequence[MutableMapping[str, Tensor]],
        layer: int | None = None,
        label: str = "",
    ) -> dict[str, Tensor]:
        """Return the canonical tensors that rules find in the shards of all tensor ranks.

        ``layer`` is the number that the shards use; ``label`` goes before names in messages.
        """
        message: dict[str, Tensor] = {}
        for entry in rules:
            names, iso = _present(entry, shards[0], layer)
            missing = [n for shard in shards for n in names if n not in shard]
            if missing:
                self.missing += [label + name for name in dict.fromkeys(missing)]
                for shard in shards:  # the others are known, and of no use alone
                    for name in names:
                        shard.pop(name, None)
                continue
            parts = []
            for shard in shards:
                try:
                    packed = [shard.pop(name) for name in names]
                    parts.append(iso.unpack(packed, self.spec, len(shards)))
                except (SchemaError, PlanError) as error:
                    raise SchemaError(f"{label}{', '.join(names)}: {error}") from error
            for number, key in enumerate(entry.keys):
                copies = [part[number] for part in parts]
                message[key] = _joined(copies, entry.tp, label + names[0])
        return message

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
    tp: int = 1,
    rank: int = 0,
) -> dict[str, Tensor]:
    """Return, by name, what tensor-parallel rank ``rank`` of ``tp`` holds of a message."""
    named: dict[str, Tensor] = {}
    for entry in rules:
        spelling = entry.spellings[0]
        cut = [_cut(message[key], entry.tp, tp, rank, key) for key in entry.keys]
        packed = spelling.iso.pack(cut, spec, tp)
        named.update(zip(_names(spelling, layer), packed, strict=True))
    return named


@dataclass(frozen=True, slots=True)
class Placed:
    """A canonical piece in a global tensor: the chunk grid of ``torch_dist``."""

    name: str
    global_shape: Shape
    origin: Shape
    tensor: Tensor
    replicated: bool


def place(
    rules: Sequence[Rule],
    message: Mapping[str, Tensor],
    spec: ModelSpec,
    layer: int | None = None,
    tp: int = 1,
    rank: int = 0,
) -> Iterator[Placed]:
    """Yield the chunks of the layout's global tensors that rank ``rank`` of ``tp`` holds."""
    for entry in rules:
        spelling = entry.spellings[0]
        whole = [message[key] for key in entry.keys]
        packed = spelling.iso.pack(whole, spec, 1)
        origins = spelling.iso.origins([tensor.shape for tensor in whole])
        names = _names(spelling, layer)
        for key, full, (number, origin) in zip(entry.keys, whole, origins, strict=True):
            piece = _cut(full, entry.tp, tp, rank, key)
            at = list(origin)
            if entry.tp is not None:
                at[entry.tp] += piece.shape[entry.tp] * rank
            replicated = entry.tp is None
            yield Placed(names[number], packed[number].shape, tuple(at), piece, replicated)


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
    entry: Rule, shard: Mapping[str, Tensor], layer: int | None
) -> tuple[tuple[str, ...], Iso]:
    """Return the first spelling that the shard has, else the first of all."""
    for spelling in entry.spellings:
        names = _names(spelling, layer)
        if all(name in shard for name in names):
            return names, spelling.iso
    return _names(entry.spellings[0], layer), entry.spellings[0].iso


def _names(spelling: Spelling, layer: int | None) -> tuple[str, ...]:
    if layer is None:
        return spelling.names
    return tuple(name.replace("{layer}", str(layer)) for name in spelling.names)


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


def _cut(tensor: Tensor, axis: int | None, tp: int, rank: int, key: str) -> Tensor:
    if axis is None or tp == 1:
        return tensor
    if tensor.shape[axis] % tp:
        raise PlanError(
            f"{key!r} {list(tensor.shape)} does not divide over tensor-parallel size {tp} "
            f"along axis {axis}"
        )
    return tensor.chunk(axis, tp, rank)


def _counted(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
