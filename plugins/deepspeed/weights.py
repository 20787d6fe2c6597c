"""From the pieces that ranks hold to whole weights.

ZeRO 1 and 2 lay the parameters of a group end to end and cut that row into one piece for each rank:

    param_shapes[g]      | embedding      | q    | k  | v  | ...          | norm |
    ranks                | 0         | 1         | 2         | 3            |

ZeRO 3 cuts every parameter by itself, into pieces of ceil(elements / ranks), the last one padded:

    rank 0               | embedding 0 | q 0 | k 0 | ...
    rank 1               | embedding 1 | q 1 | k 1 | ...

The order is that of ``param_shapes``. ``param_slice_mappings`` say something else where gradients
are assigned round robin, and are wrong then.

Source: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py,
deepspeed/runtime/zero/{stage_1_and_2,stage3}.py @ v0.19.8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from ckptx.errors import FormatError, PlanError, listing
from ckptx.plugins.deepspeed.checks import check_against_module, check_steps, same_ends
from ckptx.plugins.deepspeed.directory import Checkpoint
from ckptx.protocol.messages import Dropped, SourceTensor
from ckptx.storage.blocks import equal
from ckptx.tensors.dtypes import is_widening
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, LazyTensor, Shape, Stored, replicated

PADDING = "padding of the ranks' pieces"


@dataclass(slots=True)
class Weights:
    """The weights of a checkpoint by name, and what became of everything else that it holds."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    sources: list[SourceTensor] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    """The names of the weights without a master: they were not trained."""
    label: str = ""
    """What goes before the names of sources, where several ranks have the same."""

    def declare(self, place: str, tensors: Mapping[str, LazyTensor]) -> None:
        """Add tensors to what the source holds, those without elements left out."""
        self.sources += [
            SourceTensor(f"{self.label}{place}: {name}", tensor)
            for name, tensor in tensors.items()
            if tensor.numel
        ]

    def drop(self, name: str, reason: str, tensors: Sequence[LazyTensor]) -> None:
        """Leave declared tensors behind under one name; nothing if they have no elements."""
        if left := tuple(tensor for tensor in tensors if tensor.numel):
            self.dropped.append(Dropped(name, reason, sum(t.nbytes for t in left), left))

    def leave_frozen(self) -> None:
        """Leave behind what was not trained, by name."""
        for name in sorted(self.frozen):
            self.drop(name, "frozen, and only what was trained was asked for", [self.tensors[name]])
            del self.tensors[name]


def of_module(checkpoint: Checkpoint) -> Weights:
    """Return the weights of the module, in the dtype that was computed in.

    Raises:
        FormatError: ZeRO 3 has left none in it.
    """
    if checkpoint.stage == 3:
        raise FormatError(
            f"{checkpoint.directory}: ZeRO 3 leaves no weights in the module; take the fp32 "
            "masters: leave --weights module out"
        )
    weights = Weights(label=checkpoint.label)
    weights.tensors |= _module(checkpoint, weights)
    fragments = [one for _, _, pieces in _fragments(checkpoint, weights) for one in pieces]
    weights.drop("frozen_param_fragments", "copies of weights of the module", fragments)
    return weights


def of_masters(checkpoint: Checkpoint, widen: bool = True) -> Weights:
    """Return the fp32 masters of what is trained, and all else as the module has it.

    Frozen weights become float32 as well if ``widen``: a model has one dtype.

    Raises:
        FormatError: pieces have not the sizes that the shapes need, or masters and module are not
            of one save.
    """
    weights = Weights(label=checkpoint.label)
    module = _module(checkpoint, weights)
    if checkpoint.stage == 0 and checkpoint.optimizers:
        raise FormatError(
            f"{checkpoint.directory}: its optimizer files hold fp32 masters, and no param_shapes "
            "say whose; take the module's weights with --weights module"
        )
    if checkpoint.stage == 0 and not has_masters(checkpoint.model.get("optimizer")):
        weights.tensors |= module
        weights.notes.append("there are no fp32 masters: the weights are those of the module")
        return weights
    if checkpoint.parameters is not None:
        masters = _universal(checkpoint, checkpoint.parameters, weights)
    else:
        masters = {0: _unsplit, 2: _joined, 3: _gathered}[checkpoint.stage](checkpoint, weights)
    check_against_module(checkpoint, masters, module)
    shared = checkpoint.model.get("shared_params") or {}
    trained = dict.fromkeys(module[name] for name in (*masters, *shared) if name in module)
    weights.drop("module", "the fp32 masters of these are converted", list(trained))
    weights.tensors |= masters
    weights.tensors |= _frozen(checkpoint, module, weights, widen)
    for alias, name in shared.items():
        if name not in weights.tensors:
            raise FormatError(
                f"{checkpoint.directory}: {alias!r} shares its weight with {name!r}, which is "
                "nowhere"
            )
        if name in weights.frozen:
            weights.frozen.add(alias)
        weights.tensors[alias] = weights.tensors[name]
    lost = [name for name in checkpoint.module if name not in weights.tensors]
    if lost:  # ZeRO 3 leaves of every parameter a place holder without elements
        weights.notes.append(
            f"{listing(lost)}: in the module, and in no group of the optimizer: its weights were "
            "not saved"
        )
    return weights


def _module(checkpoint: Checkpoint, weights: Weights) -> dict[str, LazyTensor]:
    """Return the tensors of the module that have elements or need none."""
    tensors = checkpoint.module
    module: dict[str, LazyTensor] = {
        name: tensor for name, tensor in tensors.items() if checkpoint.stage < 3 or tensor.numel
    }
    if odd := [str(name) for name in checkpoint.model["module"] if str(name) not in tensors]:
        weights.notes.append(f"{listing(odd)}: in the module and no tensor, left behind")
    weights.declare("module", module)
    return module


def _joined(checkpoint: Checkpoint, weights: Weights) -> dict[str, LazyTensor]:
    """Return the masters of ZeRO 1 and 2: the pieces of all ranks, one after another."""
    check_steps(checkpoint)
    found: dict[str, LazyTensor] = {}
    states = [state["optimizer_state_dict"] for state in checkpoint.optimizers]
    for rank, state in enumerate(states):
        pieces = _pieces(checkpoint, state, "single_partition_of_fp32_groups")
        weights.declare(f"rank {rank}", {f"group {g}": piece for g, piece in enumerate(pieces)})
    tails: list[LazyTensor] = []
    for group, shapes in enumerate(checkpoint.model["param_shapes"]):
        flat = concat([state["single_partition_of_fp32_groups"][group] for state in states])
        gaps = _gaps(checkpoint, states[0], group, len(shapes))
        position = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            stop = position + math.prod(shape)
            _check_room(checkpoint, stop, flat, f"group {group}")
            found[name] = _shaped(flat.narrow(0, position, stop), tuple(shape))
            position = min(stop + gap, flat.numel)
            tails.append(flat.narrow(0, stop, position))
        _check_end(checkpoint, position, flat, f"group {group}")
        tails.append(flat.narrow(0, position, flat.numel))
    weights.drop("padding", PADDING, tails)
    return found


def _gaps(
    checkpoint: Checkpoint, state: Mapping[str, Any], group: int, count: int
) -> Sequence[int]:
    """Return how many elements of padding are behind each of a group's parameters."""
    if not (paddings := state.get("param_alignment_paddings")):
        return [0] * count
    gaps = paddings[group] if isinstance(paddings, list) and group < len(paddings) else None
    if not isinstance(gaps, list) or not all(type(gap) is int and gap >= 0 for gap in gaps):
        raise FormatError(
            f"{checkpoint.directory}: 'param_alignment_paddings' of the optimizer states are not "
            "what DeepSpeed writes; the files are damaged, or of a version that is not known"
        )
    if len(gaps) != count:
        raise FormatError(
            f"{checkpoint.directory}: group {group} has {count} parameters, and paddings of "
            f"{len(gaps)}; the files are not of one checkpoint"
        )
    return gaps


def _gathered(checkpoint: Checkpoint, weights: Weights) -> dict[str, LazyTensor]:
    """Return the masters of ZeRO 3: of each parameter a piece of every rank."""
    check_steps(checkpoint)
    flats = []
    for rank, state in enumerate(checkpoint.optimizers):
        pieces = _pieces(checkpoint, state["optimizer_state_dict"], "fp32_flat_groups")
        weights.declare(f"rank {rank}", {f"group {g}": piece for g, piece in enumerate(pieces)})
        flats.append(concat(pieces))
    found: dict[str, LazyTensor] = {}
    tails = []
    position = 0
    for name, shape in _trained(checkpoint):
        size = math.prod(shape)
        stop = position + -(-size // len(flats))
        for rank, flat in enumerate(flats):
            _check_room(checkpoint, stop, flat, f"rank {rank}")
        pieces = [flat.narrow(0, position, stop) for flat in flats]
        found[name], tail = _without_tail(pieces, shape)
        tails.append(tail)
        position = stop
    for rank, flat in enumerate(flats):
        _check_end(checkpoint, position, flat, f"rank {rank}")
        tails.append(flat.narrow(0, position, flat.numel))
    weights.drop("padding", PADDING, tails)
    return found


def _universal(
    checkpoint: Checkpoint, parameters: Mapping[str, Stored], weights: Weights
) -> dict[str, LazyTensor]:
    """Return the masters of a universal checkpoint, which are whole, and flat at ZeRO 3.

    There are files of what is not trained as well, made from the module, which is taken instead: a
    tied weight would come back rounded.
    """
    weights.declare("parameter", parameters)
    shapes = dict(_trained(checkpoint))
    if missing := [name for name in shapes if name not in parameters]:
        raise FormatError(
            f"{checkpoint.directory}: {len(missing)} of {len(shapes)} parameters have no file "
            f"zero/NAME/fp32.pt: {listing(missing)}; copy them"
        )
    found: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        tensor = parameters[name]
        if tensor.shape not in (shape, (math.prod(shape),)):
            raise FormatError(
                f"{checkpoint.directory}: {name!r} is {list(tensor.shape)} in its fp32.pt and "
                f"{list(shape)} in param_shapes"
            )
        found[name] = tensor if tensor.shape == shape else _shaped(tensor, shape)
    others = [tensor for name, tensor in parameters.items() if name not in shapes]
    weights.drop("fp32.pt of what is not trained", "made from the module's weights", others)
    return found


def _unsplit(checkpoint: Checkpoint, weights: Weights) -> dict[str, LazyTensor]:
    """Return the masters of an optimizer without ZeRO, whose tensors are whole and nameless.

    They are in the order of the optimizer. With one group and nothing frozen this is that of the
    module, which shapes and the comparison with the module confirm; else values tell whose they
    are.
    """
    optimizer = checkpoint.model["optimizer"]
    buffers = set(checkpoint.model.get("buffer_names") or ())
    kept: dict[LazyTensor, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in checkpoint.module.items():
        if name not in buffers:
            aliases[name] = kept.setdefault(tensor, name)
    groups = [_cut(group, list(kept)) for group in optimizer[_masters_key(optimizer)]]
    if not all(isinstance(master, LazyTensor) for group in groups for master in group):
        raise FormatError(
            f"{checkpoint.directory}: expected {_masters_key(optimizer)!r} of the optimizer to be "
            "tensors; it was not written by DeepSpeed"
        )
    files = [str(path) for path in checkpoint.files]
    masters = _in_order(groups, kept, files) or _identified(groups, kept, files)
    if masters is None:
        raise FormatError(
            f"{checkpoint.directory}: without ZeRO the fp32 masters have no names, and by their "
            "values several weights could be one's own; take the module's weights with "
            "--weights module"
        )
    weights.declare("master", masters)
    return {name: masters[own] for name, own in aliases.items() if own in masters}


def _in_order(
    groups: Sequence[Sequence[LazyTensor]], module: Mapping[LazyTensor, str], files: Sequence[str]
) -> dict[str, LazyTensor] | None:
    """Return the masters of one group by name, None unless they are the module's, one by one."""
    if len(groups) != 1 or len(groups[0]) != len(module):
        return None
    if not all(same_ends(*pair, files) for pair in zip(groups[0], module, strict=True)):
        return None
    return dict(zip(module.values(), groups[0], strict=True))


def _identified(
    groups: Sequence[Sequence[LazyTensor]], module: Mapping[LazyTensor, str], files: Sequence[str]
) -> dict[str, LazyTensor] | None:
    """Return every master under the name of the one weight that it is, rounded, in every byte.

    None where a master is equal to no weight, or to several, or two differ that are of one weight.
    """
    found: dict[str, LazyTensor] = {}
    for master in (tensor for group in groups for tensor in group):
        own = [
            name
            for tensor, name in module.items()
            if same_ends(master, tensor, files) and equal(master.cast(tensor.dtype), tensor, files)
        ]
        if len(own) != 1:
            return None
        (name,) = own
        known = found.setdefault(name, master)
        if known is not master:  # of a tied weight, or one that all expert-parallel ranks train
            if not equal(known, master, files):
                return None
            found[name] = replicated([known, master])
    return found


def has_masters(optimizer: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether an optimizer without ZeRO keeps weights of its own: it does not in fp32."""
    return isinstance(optimizer, Mapping) and isinstance(
        optimizer.get(_masters_key(optimizer)), list | tuple
    )


def together(optimizers: Sequence[Any]) -> dict[str, Any] | None:
    """Return the optimizers without ZeRO of several ranks as one, None unless all have masters."""
    if not optimizers or not all(map(has_masters, optimizers)):
        return None
    key = _masters_key(optimizers[0])
    return {key: [group for one in optimizers for group in one.get(key) or ()]}


def _masters_key(optimizer: Mapping[str, Any]) -> str:
    """Return the key of the masters, which a fused optimizer lays end to end."""
    return "fp32_groups_flat" if "fp32_groups_flat" in optimizer else "fp32_groups"


def _cut(group: Any, like: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Return the masters of a group, cut where those of a fused optimizer lie end to end."""
    if not isinstance(group, LazyTensor):
        return list(group) if isinstance(group, list | tuple) else [group]
    sizes = [tensor.numel for tensor in like]
    if sum(sizes) != group.numel:
        return [group]
    stops = list(itertools.accumulate(sizes))
    return [
        _shaped(group.narrow(0, stop - size, stop), tensor.shape)
        for tensor, size, stop in zip(like, sizes, stops, strict=True)
    ]


def _frozen(
    checkpoint: Checkpoint, module: Mapping[str, LazyTensor], weights: Weights, widen: bool
) -> dict[str, LazyTensor]:
    """Return what has no master: frozen weights and buffers."""
    shared = checkpoint.model.get("shared_params") or {}
    buffers = set(checkpoint.model.get("buffer_names") or ())
    rest = {
        name: tensor
        for name, tensor in module.items()
        if name not in weights.tensors and name not in shared
    }
    frozen = {name: tensor for name, tensor in rest.items() if name not in buffers}
    for name, shape, pieces in _fragments(checkpoint, weights):
        if checkpoint.stage == 3:
            frozen[name], tail = _without_tail(pieces, shape)
            weights.drop(f"{name} padding", PADDING, [tail])
        else:  # whole, and in the module as well, unless that has been left out
            frozen[name] = replicated([*([frozen[name]] if name in frozen else []), *pieces])
    weights.frozen |= frozen.keys()
    wide = widened(frozen) if widen else frozen
    if changed := [name for name in frozen if wide[name] is not frozen[name]]:
        weights.notes.append(
            f"{len(changed)} frozen weights have no fp32 master; they are widened to float32"
        )
    return {**{name: rest[name] for name in rest if name in buffers}, **wide}


def widened(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return tensors as float32, where that is exact."""
    return {
        name: tensor.cast("float32") if is_widening(tensor.dtype, "float32") else tensor
        for name, tensor in tensors.items()
    }


def _fragments(
    checkpoint: Checkpoint, weights: Weights
) -> Iterator[tuple[str, Shape, list[LazyTensor]]]:
    """Yield the name, the shape and the ranks' fragments of frozen weights; declare these."""
    shapes = checkpoint.model.get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        pieces: list[LazyTensor] = []
        for rank, model in enumerate(checkpoint.models):
            fragment = (model.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(fragment, Stored):
                raise FormatError(
                    f"{checkpoint.directory}: rank {rank} holds no fragment of the frozen weight "
                    f"{name!r}; the files are not of one checkpoint"
                )
            weights.declare(f"rank {rank}", {f"frozen {name}": fragment})
            pieces.append(fragment)
        yield name, tuple(shape), pieces


def _trained(checkpoint: Checkpoint) -> Iterator[tuple[str, Shape]]:
    """Yield the trained parameters of all groups with their shapes."""
    for shapes in checkpoint.model["param_shapes"]:
        for name, shape in shapes.items():
            yield name, tuple(shape)


def _pieces(checkpoint: Checkpoint, state: Mapping[str, Any], key: str) -> list[LazyTensor]:
    """Return what one rank holds of every group, each of one axis."""
    pieces = state.get(key)
    groups = len(checkpoint.model["param_shapes"])
    if not isinstance(pieces, list) or not all(
        isinstance(piece, Stored) and len(piece.shape) == 1 for piece in pieces
    ):
        raise FormatError(
            f"{checkpoint.directory}: expected {key!r}, a list of flat tensors, in every "
            "*_optim_states.pt; they were not written by ZeRO"
        )
    if not pieces or (checkpoint.stage == 2 and len(pieces) != groups):
        raise FormatError(
            f"{checkpoint.directory}: the model has {groups} groups of parameters, a rank's "
            f"optimizer {len(pieces)}; the files are not of one checkpoint"
        )
    return list(pieces)


def _without_tail(pieces: Sequence[LazyTensor], shape: Shape) -> tuple[LazyTensor, LazyTensor]:
    """Return the tensor that the pieces of all ranks are, and the padding behind it."""
    flat, size = concat(pieces), math.prod(shape)
    if not size <= flat.numel < size + len(pieces):
        raise FormatError(
            f"pieces of {len(pieces)} ranks hold {flat.numel} elements, {list(shape)} needs {size}"
        )
    return _shaped(flat.narrow(0, 0, size), shape), flat.narrow(0, size, flat.numel)


def _shaped(flat: LazyTensor, shape: Shape) -> LazyTensor:
    """Return a flat tensor in a shape of as many elements."""
    if not flat.numel:
        return Filled(flat.dtype, shape)
    if not shape:
        if not isinstance(flat, Stored):
            raise PlanError(f"a scalar of {type(flat).__name__}")
        return replace(flat, shape=(), strides=())
    for size in reversed(shape[1:]):
        flat = flat.split(0, size)
    return flat


def _check_room(checkpoint: Checkpoint, stop: int, flat: LazyTensor, what: str) -> None:
    if stop > flat.numel:
        raise FormatError(
            f"{checkpoint.directory}: {what} holds {flat.numel} fp32 elements, its parameters need "
            f"{stop} or more; the files are not of one checkpoint"
        )


def _check_end(checkpoint: Checkpoint, position: int, flat: LazyTensor, what: str) -> None:
    if flat.numel - position >= 2 * len(checkpoint.optimizers):  # what is padded to a multiple of
        raise FormatError(
            f"{checkpoint.directory}: {what} holds {flat.numel} fp32 elements, its parameters need "
            f"{position}; the files are not of one checkpoint"
        )
