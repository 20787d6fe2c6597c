"""The ``config.json`` of LlavaForConditionalGeneration and the dimensions of its parts.

Source: huggingface/transformers src/transformers/models/llava/configuration_llava.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.layout import Parts
from ckptx.model.spec import ModelSpec
from ckptx.registry.families import family_named
from ckptx.schemas.config.unknown_keys import unknown_among
from ckptx.schemas.conventions.vision import TOWERS, projection_spec, tower_spec

LANGUAGES = ("llama", "mistral", "qwen2", "qwen3")
"""Families that the language model can be of."""

# By model_type of the vision config; defaults are those of the config classes.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
_VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": _CLIP_DEFAULTS,
    "siglip_vision_model": {
        **{key: value for key, value in _CLIP_DEFAULTS.items() if key != "projection_dim"},
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}
# LlavaConfig fills these in where there is no vision config, or one that says nothing at all.
_VISION_OF_LLAVA = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "projection_dim": 768,
}
_DEFAULTS = {
    "image_token_index": 32000,
    "image_seq_length": 576,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
}
_WORDS = {meaning: word for word, meaning in reversed(_ACTIVATIONS.items())}
_VISION_FIELDS = (
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("layer_norm_eps", "norm_epsilon"),
)
_KEPT = ("projection_dim",)
# transformers 5 reads features behind the last norm where the vision config has this key, true
# (utils/output_capturing.py capture_outputs @ v5.23.0); earlier releases never do.
_NORMED = "tie_last_hidden_states"
_IGNORED = {
    *("ignore_index", "image_token_id", "vocab_size", "image_grid_pinpoints", _NORMED),
    *("attention_dropout", "dropout", "initializer_factor", "projection_dim"),
}
"""Known keys that say nothing of the weights or of what they compute, and `_NORMED`."""


def parts_from_config(config: Mapping[str, Any]) -> dict[str, ModelSpec]:
    """Return the dimensions that a ``config.json`` of LlavaForConditionalGeneration says.

    Raises:
        SchemaError: the vision tower, the language model or an activation is unknown.
    """
    values = {**_DEFAULTS, **config}
    language = _language_from_config(config)
    vision = _vision_from_config(config.get("vision_config") or {}, values)
    activation = _activation(values, "projector_hidden_act")
    chosen = values["vision_feature_layer"]
    projection = projection_spec(
        kind="mlp",
        input_size=vision.hidden_size * (1 if isinstance(chosen, int) else len(chosen)),
        ffn_hidden_size=language.hidden_size,
        hidden_size=language.hidden_size,
        add_bias_linear=bool(values["multimodal_projector_bias"]),
        activation=activation,
        extra={key: values[key] for key in ("image_token_index", "image_seq_length")},
    )
    unknown = {**language.unknown_keys, **_unknown_keys(config)}
    language = replace(language, unknown_keys=unknown)
    return {"vision": vision, "projection": projection, "language": language}


def _activation(values: Mapping[str, Any], key: str, place: str = "") -> str:
    if values[key] not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise SchemaError(f"{place}{key} is {values[key]!r}, known are {known}")
    return _ACTIVATIONS[values[key]]


def _unknown_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of which nothing is known, of the whole and of its vision tower."""
    seen = config.get("vision_config") or {}
    tower = unknown_among(seen, {key for table in _VISION_DEFAULTS.values() for key in table})
    own = {*_DEFAULTS, "text_config", "vision_config"}
    return {
        **unknown_among(config, own | _IGNORED),
        **{f"vision_config.{key}": tower[key] for key in tower.keys() - _IGNORED},
    }


def _text_config(config: Mapping[str, Any], dtype: str = "") -> dict[str, Any]:
    """Return the config of the language model, completed with what the whole says, or ``dtype``."""
    text = {"model_type": "llama", **(config.get("text_config") or {})}
    family = str(text["model_type"])
    if family not in LANGUAGES:
        raise SchemaError(
            f"text_config: model_type {family!r} is no language model that a LLaVA can have here; "
            f"known are {', '.join(LANGUAGES)}"
        )
    text["architectures"] = list(family_named(family).architectures)
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    if dtype:
        text.pop("torch_dtype", None)
        text["dtype"] = dtype
    return text


def _language_from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = _text_config(config)
    try:
        return family_named(text["model_type"]).from_config(text)
    except SchemaError as error:
        raise SchemaError(f"text_config: {error}") from error


def _vision_from_config(config: Mapping[str, Any], of_llava: Mapping[str, Any]) -> ModelSpec:
    kind = config.get("model_type", "clip_vision_model") if config else "clip_vision_model"
    if kind not in _VISION_DEFAULTS:
        raise SchemaError(
            f"vision_config: model_type {kind!r} is an unknown vision tower; known are "
            f"{', '.join(_VISION_DEFAULTS)}"
        )
    values = {**_VISION_DEFAULTS[kind], **(config or _VISION_OF_LLAVA)}
    name = kind.partition("_")[0]
    activation = _activation(values, "hidden_act", "vision_config: ")
    sizes = {attribute: values[key] for key, attribute in _VISION_FIELDS}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads:
        raise SchemaError(f"vision_config: hidden_size {hidden} does not divide over {heads} heads")
    if values["num_channels"] != 3:
        raise SchemaError(
            f"vision_config: {values['num_channels']} channels per pixel, expected 3: Megatron's "
            "towers see coloured images"
        )
    patches = (values["image_size"] // values["patch_size"]) ** 2
    tokens = TOWERS[name].class_tokens
    kept = {key: values[key] for key in _KEPT if key in values}
    return tower_spec(
        name,
        **sizes,
        positions=patches + tokens,
        patch_size=values["patch_size"],
        kv_channels=hidden // heads,
        activation=activation,
        extra={
            "post_norm": True,
            "pooling_head": bool(values.get("vision_use_head")),
            "feature_layer": of_llava["vision_feature_layer"],
            "select": of_llava["vision_feature_select_strategy"],
            "image_size": values["image_size"],
            # CLIP's last norm is for what it pools, and never for its features.
            "normed_features": name == "siglip" and bool(values.get(_NORMED)),
            **kept,
        },
    )


def config_from_parts(parts: Parts) -> dict[str, Any]:
    """Return a complete ``config.json`` of LlavaForConditionalGeneration.

    Raises:
        SchemaError: it cannot say what the parts say.
    """
    check(parts)
    language = parts["language"]
    text = family_named(language.family).to_config(language)
    del text["architectures"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {
            "model_type": f"{parts['vision'].family}_vision_model",
            **_vision_to_config(parts["vision"]),
            "attention_dropout": 0.0,
        },
        **_own_to_config(parts),
        "tie_word_embeddings": language.tied,
        "dtype": language.dtype,
        "torch_dtype": language.dtype,
    }


def check(parts: Parts) -> None:
    """Raise a SchemaError unless LlavaForConditionalGeneration can be these parts."""
    vision, projection, language = (parts[part] for part in ("vision", "projection", "language"))
    size = language.hidden_size
    held = (
        (vision.family in ("clip", "siglip"), f"the vision tower {vision.family}"),
        (language.family in LANGUAGES, f"a language model of family {language.family}"),
        (projection.family == "mlp", f"a projection of type {projection.family}"),
        (projection.normalization == "none", "a norm before the projection"),
        (
            projection.family != "mlp" or projection.ffn_hidden_size == size,
            f"a projection through {projection.ffn_hidden_size} channels, its language model "
            f"having {size}",
        ),
        (
            projection.activation in _ACTIVATIONS.values(),
            f"{projection.activation} in the projection",
        ),
        (
            projection.extra["input_size"] % vision.hidden_size == 0
            and (
                projection.extra["input_size"] == vision.hidden_size
                or not isinstance(vision.extra["feature_layer"], int)
            ),
            f"a projection of {projection.extra['input_size']} features, its tower having "
            f"{vision.hidden_size} (pixel shuffle)",
        ),
    )
    if reasons := [reason for fits, reason in held if not fits]:
        raise SchemaError(
            f"LlavaForConditionalGeneration does not have: {', '.join(reasons)}; names of "
            "Megatron's own converter (--to hf_llava) may"
        )


def _vision_to_config(vision: ModelSpec) -> dict[str, Any]:
    patches = vision.max_position_embeddings - vision.extra["class_tokens"]
    side = round(patches**0.5)
    if side * side != patches:
        raise SchemaError(
            f"the vision tower has {patches} patches, which are no square; a Hugging Face config "
            "says one side only"
        )
    patch = vision.extra["patch_size"]
    head = {"vision_use_head": bool(vision.extra.get("pooling_head"))}
    return {
        **{key: getattr(vision, attribute) for key, attribute in _VISION_FIELDS},
        "hidden_act": _WORDS[vision.activation],
        "image_size": vision.extra.get("image_size", side * patch),
        "patch_size": patch,
        "num_channels": 3,
        **{key: vision.extra[key] for key in _KEPT if key in vision.extra},
        **(head if vision.family == "siglip" else {}),
        **({_NORMED: True} if vision.extra.get("normed_features") else {}),
    }


def _own_to_config(parts: Parts) -> dict[str, Any]:
    """Return the keys of the config that are of no part alone."""
    vision, projection = parts["vision"], parts["projection"]
    patches = vision.max_position_embeddings - vision.extra["class_tokens"]
    seen = patches + (vision.extra["class_tokens"] if vision.extra["select"] == "full" else 0)
    token = projection.extra.get("image_token_index")
    return {
        "vision_feature_layer": vision.extra["feature_layer"],
        "vision_feature_select_strategy": vision.extra["select"],
        "projector_hidden_act": _WORDS.get(projection.activation, projection.activation),
        "multimodal_projector_bias": projection.add_bias_linear,
        "image_seq_length": projection.extra.get("image_seq_length", seen),
        **({} if token is None else {"image_token_index": token}),
    }


def differences_of(config: Mapping[str, Any], parts: Parts) -> list[str]:
    """Return one line per key in which a config contradicts the parts of a checkpoint."""
    theirs = parts_from_config(config)
    language = parts["language"]
    own = family_named(language.family).config
    text = _text_config(config, language.dtype)
    lines = [f"text_config: {line}" for line in own.differences(text, language)]
    for place, key, found, wanted in _contradictions(theirs, parts):
        lines.append(f"{place}{key}: config {found}, source {wanted}")
    return lines


def merged_config(config: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Return a config in which the parts win where both speak, and all else is left alone."""
    check(parts)
    theirs = parts_from_config(config)
    merged = dict(config)
    language = parts["language"]
    said = _text_config(config, language.dtype)
    own = family_named(language.family).config
    if own.differences(said, language):
        text = own.merge_config(said, language)
        merged["text_config"] = {k: value for k, value in text.items() if k != "architectures"}
    merged["vision_config"] = dict(config.get("vision_config") or _VISION_OF_LLAVA)
    for place, key, _, wanted in _contradictions(theirs, parts):
        (merged["vision_config"] if place else merged)[key] = wanted
    if theirs["language"].tied != language.tied:
        merged["tie_word_embeddings"] = language.tied
    return merged


def _contradictions(theirs: Parts, ours: Parts) -> Iterator[tuple[str, str, Any, Any]]:
    if theirs["vision"].family != ours["vision"].family:
        raise SchemaError(
            f"the config at hand has the vision tower {theirs['vision'].family}, the weights "
            f"{ours['vision'].family}; give the config of the same model"
        )
    for place, read in (
        ("vision_config: ", lambda parts: _vision_to_config(parts["vision"])),
        ("", _own_to_config),
    ):
        found, wanted = read(theirs), read(ours)
        for key in wanted:
            if key in found and found[key] != wanted[key]:
                yield place, key, found[key], wanted[key]
