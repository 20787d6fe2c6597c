"""The ``torch_dist`` form: PyTorch DCP files with Megatron's global tensors.

Layers are stacked: ``decoder.layers.mlp.linear_fc2.weight`` has a leading axis for the layers,
unless the model is not homogeneous and has keys per layer. There is one chunk per layer and
tensor-parallel rank; gate and up of a gated MLP are chunks of their own. Files are named after the
rank that writes.

Source: NVIDIA/Megatron-LM megatron/core/dist_checkpointing/strategies/torch.py,
megatron/core/transformer/transformer_block.py @ core_v0.16.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptx.containers import dcp, torch_zip
from ckptx.containers.dcp_metadata import DcpMetadata
from ckptx.containers.pickle_values import Namespace
from ckptx.errors import FormatError
from ckptx.model.canonical_names import MTP_LAYER, VISION, VISION_LAYER, layer_of, position_of
from ckptx.model.layout import ExtraState, Layout, Parts
from ckptx.model.pipeline_parallel import Chunk
from ckptx.model.sharding import Placed, Rank, shard_chunks
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron.adapters import unwrapped
from ckptx.plugins.megatron.directory import IterationDirectory
from ckptx.plugins.megatron.source import (
    BUFFERS,
    ENGINE_STATE,
    MADE_ANEW,
    Excluded,
    Source,
    exclude_nothing,
)
from ckptx.protocol.from_names import gathered, inventory, main_dtype
from ckptx.protocol.messages import TRAINING_STATE, Dropped, Tensors
from ckptx.protocol.model import Model
from ckptx.schemas.conventions.vision import VISION_MODEL
from ckptx.schemas.families.multimodal.llava import LANGUAGE
from ckptx.schemas.megatron_settings.args import args_of
from ckptx.storage.file_plan import FilePlan, literal_files
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_json
from ckptx.tensors.lazy import Filled, LazyTensor

METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_STACKS = ("decoder.layers.", "encoder.layers.")
_STACKED_IN = {"": "language", LANGUAGE: "language", VISION_MODEL: "vision"}
"""What goes before a stack, by the part whose layers it has."""
# A list of one element: what a sharded object of Megatron unpickles to.
_ENGINE, _NONE = [Filled("uint8", (0,))], [None]
_OPTIMIZER = ("optimizer.", "chained_")
_COMMON = "common_state/shard_0_1"


def read(checkpoint: IterationDirectory, apart: Excluded = exclude_nothing) -> Source:
    """Read the metadata of a ``torch_dist`` checkpoint.

    Raises:
        FormatError: files or chunks are missing or damaged.
    """
    directory = checkpoint.path
    _check_backend(directory / "metadata.json")
    metadata = dcp.read_metadata(directory)
    common, state = _common_state(directory, metadata)
    args = args_of(state, directory / common)
    training = [name for name in metadata.tensors if name.startswith(_OPTIMIZER)]
    files: list[str] = []
    weights = dcp.tensors(metadata, files, [n for n in metadata.tensors if n not in set(training)])
    dropped = list(_dropped(common, state, training, metadata))
    for name in [name for name in weights if name.endswith(BUFFERS)]:
        dropped.append(Dropped(name, MADE_ANEW, weights.pop(name).nbytes))
    others = {name: [tensor] for name, tensor in weights.items() if apart(name, tensor)}
    own = unwrapped({name: one for name, one in weights.items() if name not in others})

    def messages(layout: Layout, parts: Parts) -> Iterator[Tensors]:
        return gathered(layout, _unstacked(own, parts), parts)

    return Source(
        directory,
        args,
        tuple(files),
        inventory(weights),
        dropped,
        main_dtype(weights) if weights else "bfloat16",
        messages,
        own,
        apart=others,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """How a checkpoint is to be laid out."""

    layout: Layout
    states: Sequence[ExtraState]
    """The modules that keep an extra state."""
    ranks: Sequence[Rank]
    """Those of one pipeline stage."""
    chunks: Sequence[Chunk]
    args: Mapping[str, Any]
    iteration: int


def plan(model: Model, target: Target) -> Iterator[FilePlan]:
    """Yield the files of a checkpoint: one per model-parallel rank, and the metadata."""
    files: dict[int, list[dcp.TensorItem | dcp.ObjectItem]] = {}
    for chunk in target.chunks:
        first = chunk.pp_rank * len(target.ranks)
        for number, item in _items(model, target, chunk):
            files.setdefault(first + number, []).append(item)
    yield from dcp.plan_directory({f"__{rank}_0.distcp": files[rank] for rank in sorted(files)})
    common = {
        "args": Namespace(**target.args),
        "checkpoint_version": 3.0,
        "iteration": target.iteration,
        "content_metadata": {**CONTENT, "non_homogeneous_layers": True}
        if not model.spec.homogeneous
        else CONTENT,
        **_empty_stages(target.chunks),
    }
    yield torch_zip.plan_file("common.pt", common)
    yield from literal_files({"metadata.json": json.dumps(METADATA).encode()})


def _empty_stages(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Return an empty ``modelN`` for every virtual stage that holds nothing on some rank.

    A rank asks for the state of each of its stages. That of an empty one has no tensors, so
    Megatron finds it among the common state, where it saves it, or not at all.
    """
    return {
        f"model{chunk.vpp_rank}": {}
        for chunk in chunks
        if not (chunk.layers or chunk.embedding or chunk.output)
    }


def _items(
    model: Model, target: Target, chunk: Chunk
) -> Iterator[tuple[int, dcp.TensorItem | dcp.ObjectItem]]:
    """Yield what a pipeline chunk holds, and which rank of its stage writes it: the first."""
    for held in target.layout.held(model.parts):
        message, layer, spec = held.message, held.layer, held.spec
        if not holds(chunk, message, layer):
            continue
        tensors = model.messages[message]
        stacked = layer if _stacks(message, spec) else None
        names: dict[str, str] = {}
        for number, placed in shard_chunks(held.rules, tensors, spec, None, target.ranks):
            if (name := names.get(placed.name)) is None:
                name = _stacked(placed.name) if stacked is not None else placed.name
                name = names[placed.name] = name.replace("{layer}", str(layer))
            yield number, _item(placed, name, stacked, spec.num_layers)
        for state in _states(spec, target, message, layer):
            yield 0, state


def _stacks(message: str, spec: ModelSpec) -> bool:
    """Return whether a message is of a layer that is stacked with all others."""
    of_tower = message.startswith(VISION_LAYER)
    return spec.homogeneous and (of_tower or layer_of(message) is not None)


def _item(placed: Placed, name: str, layer: int | None, layers: int) -> dcp.TensorItem:
    """Return a chunk of a global tensor; ``layer`` is given where layers are stacked."""
    _, shape, origin, tensor = placed
    if layer is None:
        return dcp.TensorItem(name, shape, origin, tensor)
    return dcp.TensorItem(name, (layers, *shape), (layer, *origin), tensor.unsqueeze())


def _states(
    spec: ModelSpec, target: Target, message: str, layer: int | None
) -> Iterator[dcp.ObjectItem]:
    for state in target.states:
        if not applies(state, spec, message, layer):
            continue
        value = _ENGINE if state.engine else _NONE
        stacked = _stacks(message, spec)
        for shard in _shards(state, spec, layer if stacked else None):
            name = _stacked(state.module) if stacked else state.module
            name = name.replace("{layer}", str(layer))
            yield dcp.ObjectItem(f"{name}._extra_state/shard_{shard}", value)


def _shards(state: ExtraState, spec: ModelSpec, layer: int | None) -> Iterator[str]:
    """Yield the coordinates of a state among its kind: ``offsets_sizes``, joined by dots.

    ``layer`` is given where layers are stacked.
    """
    offsets, sizes = ([], []) if layer is None else ([str(layer)], [str(spec.num_layers)])
    if not state.sharded_by_expert:
        yield f"{'.'.join(offsets or ['0'])}_{'.'.join(sizes or ['1'])}"
        return
    experts = spec.num_experts or 0
    for expert in range(experts):
        yield f"{'.'.join([*offsets, str(expert)])}_{'.'.join([*sizes, str(experts)])}"


def applies(state: ExtraState, spec: ModelSpec, message: str, layer: int | None) -> bool:
    """Return whether a model has a module with a state in a message."""
    if state.message.format(layer=layer) != message or not state.when(spec):
        return False
    place = position_of(message, spec)
    return state.layers is None or place is None or state.layers(spec, place)


def holds(chunk: Chunk, message: str, layer: int | None) -> bool:
    """Return whether a pipeline chunk holds a message; vision is where the embeddings are."""
    if message.startswith(VISION):
        return chunk.embedding
    if message.startswith(MTP_LAYER):
        return chunk.mtp
    if layer is not None:
        return layer in chunk.layers
    return chunk.embedding if message == "embeddings" else chunk.output


def _stacked(name: str) -> str:
    return name.replace("layers.{layer}.", "layers.")


def _parted(name: str) -> tuple[str, str, str]:
    """Return what goes before a stack of layers, the stack, and what follows; else the name."""
    return next((parts for s in _STACKS if (parts := name.partition(s))[1]), (name, "", ""))


def _unstacked(tensors: Mapping[str, LazyTensor], parts: Parts) -> dict[str, LazyTensor]:
    """Return the tensors under names per layer; those that have them already stay as they are."""
    named = {}
    for name, tensor in tensors.items():
        model, stack, rest = _parted(name)
        part = _STACKED_IN.get(model, "")
        if not stack or part not in parts or rest.partition(".")[0].isdigit():
            named[name] = tensor
            continue
        layers = parts[part].num_layers
        if tensor.shape[0] != layers:
            raise FormatError(
                f"{name!r} stacks {tensor.shape[0]} layers, the checkpoint's args say {layers}"
            )
        for layer in range(layers):
            one = tensor.narrow(0, layer, layer + 1).squeeze()
            named[f"{model}{stack}{layer}.{rest}"] = one
    return named


def _dropped(
    common: str, state: Mapping[str, Any], training: Sequence[str], metadata: DcpMetadata
) -> Iterator[Dropped]:
    sizes: dict[str, int] = {}
    for (key, _), location in metadata.items.items():
        sizes[key] = sizes.get(key, 0) + location.length
    groups: dict[str, int] = {}
    if states := [name for name in metadata.objects if "_extra_state" in name]:
        size = sum(sizes.get(name, 0) for name in states)
        yield Dropped(f"{len(states)} _extra_state objects", ENGINE_STATE, size)
    for name in (*training, *metadata.objects):
        if name != _COMMON and ("_extra_state" not in name or name.startswith(_OPTIMIZER)):
            group = name.partition("/")[0].partition(".")[0]
            groups[group] = groups.get(group, 0) + sizes.get(name, 0)
    for group, size in groups.items():
        yield Dropped(group, TRAINING_STATE, size)
    for key in ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine"):
        if state.get(key) is not None:
            yield Dropped(f"{common}: {key}", TRAINING_STATE)


def args_in(checkpoint: IterationDirectory) -> dict[str, Any]:
    """Return the args of a checkpoint, of whose other metadata no more is read than that takes.

    Raises:
        FormatError: they are damaged.
    """
    name, state = _common_state(checkpoint.path)
    return args_of(state, checkpoint.path / name)


def _common_state(directory: Location, metadata: DcpMetadata | None = None) -> tuple[str, Any]:
    """Return the name of the state that all ranks share, a file or an object, and the state.

    Up to core 0.18 it has a file of its own; later it is an object among the others.

    Source: megatron/core/dist_checkpointing/serialization.py @ core_v0.19.0.
    """
    file = directory / "common.pt"
    if file.is_file():
        return file.name, torch_zip.read(file, 0)
    metadata = metadata or dcp.read_metadata(directory)
    if _COMMON not in metadata.objects:
        raise FormatError(f"{file}: is missing; the checkpoint is incomplete")
    match dcp.read_object(metadata, _COMMON, []):
        case [state]:
            return _COMMON, state
    raise FormatError(
        f"{directory}: {_COMMON}: expected a list of one dictionary; the checkpoint is damaged"
    )


def _check_backend(path: Any) -> None:
    backend = read_json(path).get("sharded_backend")
    if backend != "torch_dist":
        raise FormatError(
            f"{path}: sharded_backend is {backend!r}, expected 'torch_dist'; zarr checkpoints must "
            "be saved again by the Megatron that wrote them"
        )
