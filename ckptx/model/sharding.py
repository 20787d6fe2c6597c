"""How the tensors of a model lie on its ranks: give each its part, take the whole from all.

Shards are cut in canonical space and packed afterwards: a rank's gated weight is
``GLU.pack([gate.chunk, up.chunk])``, which is what Megatron stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ckptx.errors import NamesError, PlanError, SchemaError, first_few, listing
from ckptx.model.layout import Layout, Rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import Tensor, Transform
from ckptx.tensors.joins import concat, unstacked
from ckptx.tensors.lazy import LazyTensor, Shape, replicated

Shard: TypeAlias = MutableMapping[str, LazyTensor]


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


class Gatherer:
    """Takes the tensors of messages out of shards, and knows what is missing and what is left.

    ``take`` removes what it uses from the shards' mappings. Names that were not found are
    collected, so that one error can list them all.
    """

    def __init__(self, layout: Layout, spec: ModelSpec) -> None:
        self.layout = layout
        self.spec = spec
        self.missing: list[str] = []

    def of(self, spec: ModelSpec) -> Gatherer:
        """Return a taker for a part of these dimensions; what it does not find is missing here."""
        other = Gatherer(self.layout, spec)
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
            names, transform = _present(entry, groups[0][0][0], layer, experts)
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
            parts = [self._unpacked(names, transform, group, label) for group in groups]
            place = label + names[0]
            for number, key in enumerate(entry.keys):
                joined = [
                    _joined([part[number] for part in ranks], self._cut(entry, ranks), place)
                    for ranks in parts
                ]
                message[key] = concat(joined, entry.ep) if entry.ep is not None else joined[0]
        return message

    def _unpacked(
        self,
        names: Sequence[str],
        transform: Transform,
        ranks: Sequence[Sequence[Shard]],
        label: str,
    ) -> list[list[Tensor]]:
        """Return the canonical parts of each tensor-parallel rank; its copies are one."""
        parts = []
        for copies in ranks:
            try:
                packed = [replicated([shard.pop(name) for shard in copies]) for name in names]
                parts.append(transform.unpack(packed, self.spec, len(ranks)))
            except (SchemaError, PlanError) as error:
                raise SchemaError(f"{label}{first_few(names, 3)}: {error}") from error
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
            error = NamesError(f"layout {self.layout.name}: {'; '.join(problems)}")
            error.missing, error.extra = tuple(self.missing), tuple(left)
            raise error


def shard_tensors(
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
            experts = cut[0].shape[entry.ep] if entry.ep is not None else 0
            names = spelling.named(layer, experts)
            packed = _packed(entry, names, cut, spec, rank.tp if entry.ep is None else rank.etp)
            known[share] = dict(zip(names, packed, strict=True))
        named.update(known[share])
    return named


def _packed(
    entry: Rule, names: Sequence[str], tensors: Sequence[Tensor], spec: ModelSpec, size: int
) -> Sequence[Tensor]:
    """Return the canonical tensors of a rule as a layout stores them, on one of ``size`` ranks."""
    try:
        return entry.spellings[0].transform.pack(tensors, spec, size)
    except PlanError as error:
        own = zip(entry.keys, tensors, strict=True)
        found = ", ".join(f"{key} {tensor.dtype} {list(tensor.shape)}" for key, tensor in own)
        raise PlanError(f"{first_few(names, 3)}, of {found}: {error}") from error


def _coordinates(entry: Rule, rank: Rank) -> tuple[int, ...]:
    """Return the coordinates of a rank that say which part of a rule's tensors it holds."""
    if entry.ep is not None:
        return rank.ep_rank, rank.etp_rank
    return () if entry.tp is None else (rank.tp_rank,)


class Placed(NamedTuple):
    """A canonical piece in a global tensor: the chunk grid of ``torch_dist``."""

    name: str
    global_shape: Shape
    origin: Shape
    tensor: Tensor


def shard_chunks(
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
        names = spelling.named(layer, 0)
        packed = _packed(entry, names, whole, spec, 1)
        origins = spelling.transform.origins([tensor.shape for tensor in whole])
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


def _present(
    entry: Rule, shard: Mapping[str, Tensor], layer: int | None, experts: int
) -> tuple[tuple[str, ...], Transform]:
    """Return the first spelling that the shard has, else the first of all."""
    for spelling in entry.spellings:
        names = spelling.named(layer, experts)
        if all(name in shard for name in names):
            return names, spelling.transform
    return entry.spellings[0].named(layer, experts), entry.spellings[0].transform


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
