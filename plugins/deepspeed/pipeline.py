"""Checkpoints of a PipelineModule: a file for each layer, whose tensors have no names of a model.

    layer_00-model_states.pt     weight                      0.weight
    layer_01-model_states.pt     self_attn.q_proj.weight     1.self_attn.q_proj.weight
                                 in the file                 in param_shapes, with its layer

A layer map says what goes before the names of each layer, or instead of them; in a range of layers
``{i}`` counts from 0:

    {"0": "model.embed_tokens.",  "1-24": "model.layers.{i}.",  "26": {"weight": "lm_head.weight"}}

It is made without being given where layers have the very names of a known model's decoder layers.

Source: deepspeedai/DeepSpeed deepspeed/runtime/pipe/module.py @ v0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptx.errors import FormatError, listing
from ckptx.plugins.deepspeed.directory import Checkpoint, Saved
from ckptx.plugins.deepspeed.weights import together
from ckptx.storage.blocks import equal
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_json
from ckptx.tensors.lazy import LazyTensor, Shape, Stored

_TIED = "tied_modules."
_NEEDED = (
    "give --hf-base with the config of the model, or --layer-map with a JSON file as "
    '{"0": "model.embed_tokens.", "1-24": "model.layers.{i}.", ...}'
)


def stages(saved: Saved) -> Iterator[Checkpoint]:
    """Yield what every stage has, its layers' tensors under their names with the layer's number.

    Raises:
        FormatError: it is not known which layer a tied module is.
    """
    tensors = numbered(saved)
    for found in saved.ranks:
        if not found.stage and found.optimizers:
            found.models = [{**found.model, "param_shapes": _mapped(found, tensors)}]
            found.stage = 2
    models = [{**found.model, "param_shapes": _named(saved, found)} for found in saved.ranks]
    if not saved.ranks[0].stage:
        # Masters without ZeRO have no names of their own: they are those of all stages.
        model = {**models[0], "module": tensors, "param_shapes": None}
        if one := together([model.get("optimizer") for model in models]):
            model["optimizer"] = one
        yield replace(saved.ranks[0], models=[model], label="")
        return
    trained = [{n for shapes in model["param_shapes"] for n in shapes} for model in models]
    for name in sorted(name for own in trained for name in own):
        layer = name.partition(".")[0]
        if not layer.isdigit() or int(layer) not in saved.layers:
            raise FormatError(
                f"{saved.directory}: {name!r} is in param_shapes, and there is no file of its "
                f"layer, layer_{layer:>02}-model_states.pt; copy it"
            )
    rest = {name: t for name, t in tensors.items() if not any(name in own for own in trained)}
    for found, model, own in zip(saved.ranks, models, trained, strict=True):
        model["module"] = {name: tensors[name] for name in own if name in tensors} | rest
        yield replace(found, models=[model])
        rest = {}


def numbered(saved: Saved) -> dict[str, Stored]:
    """Return the tensors of all layers under their names with the layer's number."""
    return {
        f"{layer}.{name}": tensor
        for layer, tensors in saved.layers.items()
        for name, tensor in tensors.items()
    }


def _mapped(found: Checkpoint, tensors: Mapping[str, Stored]) -> list[dict[str, Shape]]:
    """Return the shapes of a stage whose optimizer has cut its masters, and ZeRO is off.

    `BF16_Optimizer` does so in every pipeline of bf16. Names are in the mappings of the slices,
    which say every rank's in its order; whether they are right the module shows.
    """
    groups: list[dict[str, Shape]] = []
    for state in found.optimizers:
        mappings = state["optimizer_state_dict"].get("param_slice_mappings")
        sound = isinstance(mappings, list) and all(isinstance(one, Mapping) for one in mappings)
        if not (mappings and sound):
            raise FormatError(
                f"{found.directory}: no param_slice_mappings say whose the masters are; take the "
                "module's weights with --weights module"
            )
        groups += [{} for _ in range(len(mappings) - len(groups))]
        for group, names in zip(groups, mappings, strict=False):
            if unknown := [name for name in names if name not in tensors]:
                raise FormatError(
                    f"{found.directory}: {listing(map(str, unknown))}: no shape is known of it; "
                    "take the module's weights with --weights module"
                )
            group |= {name: tensors[name].shape for name in names}
    return groups


def _named(saved: Saved, found: Checkpoint) -> list[dict[str, Any]] | None:
    """Return the shapes of a stage with tied modules under the names of their first layer."""
    if not (groups := found.model.get("param_shapes")):
        return None
    named = {n for rank in saved.ranks for own in rank.model["param_shapes"] or () for n in own}
    own = {layer for layer in saved.layers if not any(n.startswith(f"{layer}.") for n in named)}
    tied: dict[str, dict[str, Shape]] = {}
    for name, shape in (item for group in groups for item in group.items()):
        if name.startswith(_TIED):
            key, _, rest = name.removeprefix(_TIED).partition(".")
            tied.setdefault(key, {})[rest] = tuple(shape)
    names: dict[str, str] = {}
    for key, shapes in tied.items():
        layer = _layer_of(saved, key, shapes, own)
        names |= {f"{_TIED}{key}.{rest}": f"{layer}.{rest}" for rest in shapes}
    return [{names.get(name, name): shape for name, shape in own.items()} for own in groups]


def _layer_of(saved: Saved, key: str, shapes: Mapping[str, Shape], among: set[int]) -> int:
    """Return the first of the layers that a tied module may be; they must be equal."""
    fitting = []
    for layer in sorted(among):
        held = {name: tensor.shape for name, tensor in saved.layers[layer].items()}
        if held.items() >= shapes.items():
            fitting.append(layer)
    files = [str(path) for path in saved.files]
    same = fitting and all(
        equal(saved.layers[layer][name], saved.layers[fitting[0]][name], files)
        for layer in fitting
        for name in shapes
    )
    if not same:
        raise FormatError(
            f"{saved.directory}: of {len(fitting)} layers it is not known which is the tied module "
            f"{key!r}; take the module's weights with --weights module"
        )
    return fitting[0]


def renamed(
    tensors: Mapping[str, LazyTensor], saved: Saved, file: str | None, known: Mapping[str, Shape]
) -> tuple[dict[str, LazyTensor], str]:
    """Return the tensors of all layers under the names of a model, and a remark how.

    ``file`` is the layer map; without one it is made from the ``known`` names of the model.

    Raises:
        FormatError: the map is not sound or incomplete, or none was given and none can be made.
    """
    names = _from_file(Path(file), saved) if file else _automatic(saved, known)
    if left := [name for name in tensors if name not in names]:
        raise FormatError(f"{file or saved.directory}: no name for {listing(left)}; {_NEEDED}")
    found: dict[str, LazyTensor] = {}
    for own, tensor in tensors.items():
        if names[own] in found:
            raise FormatError(
                f"{file or saved.directory}: {own!r} and another tensor are both {names[own]!r}"
            )
        found[names[own]] = tensor
    first = {own.split(".")[0]: (own, name) for own, name in reversed(names.items())}
    said = ", ".join(f"{own} is {name}" for own, name in list(first.values())[::-1][:3])
    origin = "the layer map" if file else "their own names"
    return found, f"layers were named by {origin}: {said}, ..."


def _from_file(file: Location, saved: Saved) -> dict[str, str]:
    """Return the name in the model of every tensor that a layer map speaks of."""
    said = read_json(file)
    try:
        entries = [(_range(key), value) for key, value in said.items()]
    except ValueError as error:
        raise FormatError(f"{file}: no layer map: {error}; {_NEEDED}") from error
    names: dict[str, str] = {}
    for layers, value in entries:
        for place, layer in enumerate(layers):
            for own in saved.layers.get(layer, {}):
                whole = value.get(own) if isinstance(value, dict) else value
                if not isinstance(whole, str):
                    raise FormatError(f"{file}: layer {layer} has {own!r}, and no name for it")
                name = whole if isinstance(value, dict) else whole + own
                if f"{layer}.{own}" in names:
                    raise FormatError(f"{file}: layer {layer} is there twice")
                names[f"{layer}.{own}"] = name.replace("{i}", str(place))
    return names


def _range(key: str) -> range:
    first, _, last = key.partition("-")
    return range(int(first), int(last or first) + 1)


def _automatic(saved: Saved, known: Mapping[str, Shape]) -> dict[str, str]:
    """Return the names of a known model that only one reading of the layers gives.

    Decoder layers have the names of one; what lies before and behind them is known by its shape.
    """
    layers: dict[str, dict[str, str]] = {}
    before: list[str] = []
    behind: list[str] = []
    for name in known:  # in the order of the model
        words = name.split(".")
        number = next((n for n, word in enumerate(words) if word.isdigit()), None)
        if number is None:
            (behind if layers else before).append(name)
        else:
            place, own = ".".join(words[: number + 1]), ".".join(words[number + 1 :])
            layers.setdefault(place, {})[own] = name
    decoders = iter(layers.values())
    count = 0
    expected = next(decoders, None)
    names: dict[str, str] = {}
    for layer, tensors in saved.layers.items():
        if expected is not None and set(tensors) == set(expected):
            names |= {f"{layer}.{own}": name for own, name in expected.items()}
            count, expected = count + 1, next(decoders, None)
            continue
        for own, tensor in tensors.items():
            open_to = [
                name
                for name in (behind if count else before)
                if known[name] == tensor.shape and name not in names.values()
                if name.endswith(f".{own}") or name == own
            ]
            if len(open_to) == 1:
                names[f"{layer}.{own}"] = open_to[0]
    every = [f"{layer}.{own}" for layer, own_names in saved.layers.items() for own in own_names]
    unnamed = [name for name in every if name not in names]
    if unnamed or count < len(layers) or not known:
        why = f"no name is known for {listing(unnamed, 3)}" if known else "the model is not known"
        raise FormatError(
            f"{saved.directory}: the layers of a PipelineModule, and {why}; {_NEEDED}"
        )
    return names
