"""Megatron's ``args`` of a LLaVA and the dimensions of its parts, in both directions.

Megatron's command line says the language model and names tower and language model; the sizes of the
tower and the projection are fixed in the code of its examples, by those names. So they are read
from the weights' shapes, and what shapes cannot say is Megatron's, unless a converted checkpoint
brought it along in the entry `ckptx.schemas.megatron_settings.args.NOTE`.

Source: NVIDIA/Megatron-LM examples/multimodal/{config,model,multimodal_args}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.layout import Parts
from ckptx.model.spec import ModelSpec
from ckptx.schemas.conventions.vision import (
    TOWERS,
    VISION_MODEL,
    VISION_PROJECTION,
    norm_among,
    projection_spec,
    tower_spec,
)
from ckptx.schemas.megatron_settings import settings
from ckptx.schemas.megatron_settings.args import NOTE
from ckptx.tensors.lazy import LazyTensor, Shape

_SILU: Mapping[str, Any] = {"swiglu": True, "add_bias_linear": False}
_SQUARED: Mapping[str, Any] = {"squared_relu": True, "swiglu": False, "add_bias_linear": False}
_QWEN: Mapping[str, Any] = {**_SILU, "add_qkv_bias": True}


@dataclass(frozen=True, slots=True)
class Named:
    """What Megatron's examples fix for a ``language_model_type``."""

    family: str
    args: Mapping[str, Any]
    ffn_hidden_size: int
    num_layers: int | None
    projection: Mapping[str, Any]


def _projection(ffn: int, norm: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a projection's dimensions; without a norm of its own that of the language model."""
    known = {"add_bias_linear": False, "normalization": norm, "ffn_hidden_size": ffn}
    return {**known, "activation": "gelu", **more}


_NEMOTRON = _projection(21504, activation="squared_relu")
_LLAMA31 = _projection(4096, "LayerNorm", add_bias_linear=True)
LANGUAGES: Mapping[str, Named] = {
    "llama3_8b": Named("llama", _SILU, 14336, 32, _projection(14336)),
    "llama3.1_8b": Named("llama", _SILU, 14336, 32, _LLAMA31),
    "llama3.1_70B": Named("llama", _SILU, 28672, 80, {}),
    "mistral_7b": Named("mistral", _SILU, 14336, 32, _projection(14336, "none")),
    "nemotron5-8b": Named("gpt", _SQUARED, 21504, None, _NEMOTRON),
    "yi-34b": Named("llama", _SILU, 20480, 60, _projection(20480, "LayerNorm")),
    "qwen2.0_72B": Named("qwen2", _QWEN, 29568, 80, _projection(29568, "LayerNorm")),
    "qwen2.5_7B": Named("qwen2", _QWEN, 18944, 28, _projection(3584)),
    "qwen2.5_72B": Named("qwen2", _QWEN, 29568, 80, _projection(29568, "LayerNorm")),
    "llama3.2_1b": Named("llama", _SILU, 8192, 16, _projection(2048, "LayerNorm")),
}
"""By ``language_model_type``."""

_NAMES = """
    tokenizer_prompt_format special_tokens use_tiling max_num_tiles use_thumbnail use_tile_tags
    image_tag_type allow_missing_vision_projection_checkpoint freeze_LM freeze_ViT num_frames
    recompute_vision force_system_message
"""
_WRITTEN = _NAMES.split()
"""What Megatron's converter wants to find besides, where the source does not say."""
_NOT_MEGATRONS = {"tokenizer_prompt_format": "dummy", "special_tokens": ["<image>"]}


KEPT = ("image_size", "projection_dim")
"""What a tower's ``extra`` says besides that Megatron has no place for."""


def is_llava(tensors: Mapping[str, LazyTensor]) -> bool:
    """Return whether a checkpoint's names are those of a LLaVAModel."""
    return any(name.startswith(VISION_MODEL) for name in tensors)


def language_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return args as the examples complete them for the language model they name."""
    named = LANGUAGES.get(str(args.get("language_model_type")))
    if named is None or args.get(NOTE):
        return dict(args)
    return {**args, **named.args, "ffn_hidden_size": named.ffn_hidden_size}


def vision_parts(
    args: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    cut: int,
    config: Parts | None,
    language: ModelSpec,
) -> dict[str, ModelSpec]:
    """Return the dimensions of tower and projection.

    ``tensors`` are those of the first rank, ``cut`` is its tensor-parallel size; ``config`` are the
    parts that a config at hand says.

    Raises:
        SchemaError: the tower is unknown, or the weights are not of its kind.
    """
    shapes = Shapes({name: tensor.shape for name, tensor in tensors.items()}, cut)
    name = args.get("vision_model_type") or (config["vision"].family if config else None)
    if name not in TOWERS:
        raise SchemaError(
            f"vision_model_type {name!r} is no vision tower that ckptx knows; known are "
            f"{', '.join(TOWERS)}"
        )
    vision = _vision(str(name), args, shapes, config)
    return {"vision": vision, "projection": _projected(args, shapes, config, language)}


def _noted(args: Mapping[str, Any], part: str) -> Mapping[str, Any] | None:
    """Return what a converted checkpoint says of a part, None for one of Megatron's own."""
    said: Mapping[str, Any] | None = (args.get(NOTE) or {}).get("parts", {}).get(part)
    if said is not None and not {"kv_channels", "norm_epsilon", "activation", "extra"} <= set(said):
        raise SchemaError(f"the entry {NOTE!r} of args is not what ckptx has written; remove it")
    return said


class Shapes:
    """Shapes of whole tensors by name, from those of one rank or of stacks of layers."""

    def __init__(self, shapes: Mapping[str, Shape], cut: int) -> None:
        self.shapes = shapes
        self._cut = cut

    def whole(self, name: str, axes: int, cut: int | None = None) -> Shape:
        """Return the shape of a tensor of so many axes, one of which ranks have cut.

        Raises:
            SchemaError: there is no such tensor, or it has other axes.
        """
        if name not in self.shapes:
            raise SchemaError(f"the checkpoint holds no {name!r}, which says a size of its model")
        found = self.shapes[name]
        if len(found) != axes:
            raise SchemaError(f"{name!r} is {list(found)}, expected {axes} axes")
        return tuple(n * self._cut if axis == cut else n for axis, n in enumerate(found))

    def layer(self, name: str, cut: int) -> Shape:
        """Return the shape of a matrix of a tower's first layer, stacked or not."""
        first, stack = f"{_LAYERS}0.{name}", _LAYERS + name
        if first in self.shapes or stack not in self.shapes:
            return self.whole(first, 2, cut)
        return self.whole(stack, 3, cut + 1)[1:]

    def width(self) -> int:
        """Return how wide the attention of a tower is: all its heads, side by side."""
        return self.layer(_OUTPUT, 1)[1]

    def layers(self) -> int:
        """Return how many layers a tower has."""
        stack = _LAYERS + _OUTPUT
        if stack in self.shapes:
            return self.whole(stack, 3)[0]
        inside = (name.removeprefix(_LAYERS) for name in self.shapes if name.startswith(_LAYERS))
        return len({name.partition(".")[0] for name in inside})


_LAYERS = f"{VISION_MODEL}decoder.layers."
_OUTPUT = "self_attention.linear_proj.weight"


def _vision(name: str, args: Mapping[str, Any], shapes: Shapes, config: Parts | None) -> ModelSpec:
    tower, noted = TOWERS[name], _noted(args, "vision")
    hidden, width = shapes.layer(_OUTPUT, 1)
    ffn = shapes.layer("mlp.linear_fc2.weight", 1)[1]
    rows = shapes.layer("mlp.linear_fc1.weight", 0)[0]
    if rows not in (ffn, 2 * ffn):
        raise SchemaError(f"the tower's linear_fc1 has {rows} rows, linear_fc2 {ffn} columns")
    convolved = f"{VISION_MODEL}conv1.weight"
    if convolved in shapes.shapes:
        patch = shapes.whole(convolved, 4)[-1]
        positions = shapes.whole(f"{VISION_MODEL}position_embeddings.weight", 2)[0]
    else:
        patch = round((shapes.whole(f"{VISION_MODEL}embedder.weight", 2)[1] / 3) ** 0.5)
        positions = shapes.whole(f"{VISION_MODEL}position_embeddings", 3)[1]
    token = shapes.shapes.get(f"{VISION_MODEL}class_token", ())
    tokens = token[-2] if tower.class_tokens and len(token) > 1 else tower.class_tokens
    known = config["vision"] if config and config["vision"].family == name else None
    channels = noted["kv_channels"] if noted else known.kv_channels if known else tower.kv_channels
    # InternViT is padded with heads that count for nothing; the true ones are as wide as the model.
    true_width = hidden if name == "internvit" else width
    if true_width % channels or width % channels:
        raise SchemaError(
            f"the tower's attention is {width} wide, which is no number of heads of {channels}; "
            "give the model's config with --hf-base"
        )
    extra: dict[str, Any] = {
        "class_tokens": tokens,
        "normed_features": tower.post_norm,
        "select": "default" if args.get("disable_vision_class_token") and tokens else "full",
    }
    if args.get("img_h") and args["img_h"] == args.get("img_w"):
        extra["image_size"] = args["img_h"]
    # What Megatron's code fixes only a converted checkpoint can say otherwise, a config cannot.
    said = {"normed_features": noted["extra"].get("normed_features")} if noted else {}
    kept = noted["extra"] if noted else known.extra if known else {}
    extra |= {key: kept[key] for key in KEPT if key in kept} | said
    eps = tower.norm_epsilon or args.get("layernorm_epsilon") or args.get("norm_epsilon")
    return tower_spec(
        name,
        num_layers=shapes.layers(),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=true_width // channels,
        positions=positions,
        patch_size=patch,
        kv_channels=channels,
        norm_epsilon=noted["norm_epsilon"] if noted else eps or 1e-5,
        activation=noted["activation"] if noted else tower.activation,
        extra=extra,
    )


def _projected(
    args: Mapping[str, Any], shapes: Shapes, config: Parts | None, language: ModelSpec
) -> ModelSpec:
    noted, single = _noted(args, "projection"), f"{VISION_PROJECTION}weight"
    names = [name for name in shapes.shapes if name.startswith(VISION_PROJECTION)]
    if not names:
        raise SchemaError("the checkpoint holds no vision_projection: its model cannot see")
    first = f"{VISION_PROJECTION}linear_fc1."
    if single in shapes.shapes:
        kind, (rows, features) = "affine", shapes.whole(single, 2, 0)
        out, bias = rows, f"{VISION_PROJECTION}bias" in shapes.shapes
    elif f"{first}weight" in shapes.shapes:
        kind, (rows, features) = "mlp", shapes.whole(f"{first}weight", 2, 0)
        out = shapes.whole(f"{VISION_PROJECTION}linear_fc2.weight", 2)[0]
        bias = f"{first}bias" in shapes.shapes
    else:
        raise SchemaError(
            f"vision_projection is neither an mlp nor affine: it holds {', '.join(names[:3])}"
        )
    if out != language.hidden_size:
        raise SchemaError(
            f"vision_projection gives {out} channels, the language model has "
            f"{language.hidden_size}; they are not of one model"
        )
    named = LANGUAGES.get(str(args.get("language_model_type")))
    kept = noted["extra"] if noted else config["projection"].extra if config else {}
    usual = named.projection.get("activation", "gelu") if named else "gelu"
    return projection_spec(
        kind=kind,
        input_size=features,
        ffn_hidden_size=rows,
        hidden_size=out,
        add_bias_linear=bias,
        normalization=norm_among(shapes.shapes, f"{first}layer_norm_"),
        activation=noted["activation"] if noted else usual,
        extra={key: value for key, value in kept.items() if key != "input_size"},
    )


def llava_args(parts: Parts, source: Mapping[str, Any], note: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``args`` that a LLaVA has besides those of its language model.

    ``note`` is the entry that the language model has already.
    """
    vision, projection = parts["vision"], parts["projection"]
    size = vision.extra.get("image_size")
    images = {"img_h": size, "img_w": size} if size else {}
    kept = {part: parts[part].dimensions() for part in ("vision", "projection")}
    return {
        **settings.defaults(_WRITTEN, _NOT_MEGATRONS),
        **{key: source[key] for key in _WRITTEN if source.get(key) is not None},
        **images,
        "patch_dim": vision.extra["patch_size"],
        "vision_model_type": vision.family,
        "language_model_type": source.get("language_model_type") or language_type(parts),
        "disable_vision_class_token": vision.extra["select"] == "default",
        "pixel_shuffle": projection.extra["input_size"] == 4 * vision.hidden_size,
        "decoder_seq_length": source.get("decoder_seq_length")
        or parts["language"].max_position_embeddings,
        NOTE: {**note, "parts": kept},
    }


def language_type(parts: Parts) -> str:
    """Return the name that Megatron's examples have for a language model, else its family's."""
    language = parts["language"]
    for name, named in LANGUAGES.items():
        sizes = (language.family, language.ffn_hidden_size, language.num_layers)
        if sizes == (named.family, named.ffn_hidden_size, named.num_layers):
            return name
    return language.family


def unsupported_by_megatron(parts: Parts) -> list[str]:
    """Return what Megatron's LLaVAModel cannot be: reasons to refuse the conversion."""
    vision, language = parts["vision"], parts["language"]
    reasons = []
    if language.num_experts or language.multi_latent_attention or language.mtp_num_layers:
        reasons.append(
            "a language model with experts, latent attention or multi-token prediction, which "
            "ckptx converts without vision only"
        )
    if vision.extra["select"] == "default" and not vision.extra["class_tokens"]:
        reasons.append(
            f"vision_feature_select_strategy 'default' with {vision.family}, which has no class "
            "token: the first patch would be left out"
        )
    return reasons


def notes(parts: Parts) -> Iterator[str]:
    """Yield what Megatron's examples must be told by hand although all weights are there."""
    vision, projection = parts["vision"], parts["projection"]
    tower = TOWERS[vision.family]
    own = ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "activation")
    wanted = {key: (getattr(tower, key), getattr(vision, key)) for key in own}
    epsilon = parts["language"].norm_epsilon if tower.norm_epsilon is None else tower.norm_epsilon
    wanted["layernorm_epsilon"] = (epsilon, vision.norm_epsilon)
    changed = [
        f"{key} {here} (not {there})" for key, (there, here) in wanted.items() if there != here
    ]
    if changed:
        yield (
            f"examples/multimodal/config.py fixes the tower {vision.family}: set "
            f"{', '.join(changed)} in get_vision_model_config"
        )
    name = language_type(parts)
    named = LANGUAGES.get(name)
    if named is None:
        yield (
            f"examples/multimodal/config.py knows no language model {name!r}: add it to "
            "get_language_model_config and get_vision_projection_config"
        )
    yield from _projection_notes(projection, named)
    if vision.extra["post_norm"] and not vision.extra.get("normed_features"):
        yield (
            f"transformers reads the features of {vision.family} before post_layernorm, Megatron "
            "behind it: set vision_model.ln_post to None after the model is built"
        )


def _projection_notes(projection: ModelSpec, named: Named | None) -> Iterator[str]:
    known = named.projection if named else {}
    keys = ("add_bias_linear", "normalization", "ffn_hidden_size", "activation")
    found = {key: getattr(projection, key) for key in keys}
    differing = {key: value for key, value in found.items() if known.get(key) != value}
    if differing.get("normalization") == "RMSNorm" and known.get("normalization", "") is None:
        del differing["normalization"]  # the language model's own
    if differing:
        said = ", ".join(f"{key} {value}" for key, value in differing.items())
        yield (
            f"the projection of this model has {said}: say so in get_vision_projection_config of "
            "examples/multimodal/config.py"
        )


def with_heads(vision: ModelSpec, heads: int) -> ModelSpec:
    """Return a tower with so many heads, some of which count for nothing."""
    return replace(vision, num_attention_heads=heads, num_query_groups=heads)
