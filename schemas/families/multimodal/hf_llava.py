"""LLaVA in the names that Megatron's converter gives it in Hugging Face files.

Megatron's saver writes weights alone. The sizes of the tower follow from them; the language model
is described by the ``config.json`` that ckptx writes beside them, or by one that the user names.

Source: NVIDIA/Megatron-LM tools/checkpoint/{saver_hf_llava,schema_hf}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.layout import Parts
from ckptx.model.spec import ModelSpec
from ckptx.registry.families import family_named
from ckptx.schemas.conventions.vision import TOWERS, norm_among, projection_spec, tower_spec
from ckptx.schemas.families.multimodal.llava_config import LANGUAGES
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, LazyTensor

MODEL_TYPE = "megatron_llava"
TOWERS_HELD = ("internvit", "siglip", "radio")
"""Towers for which there are names."""
_VIT, _RADIO = "vision_model.vision_model.", "vision_model.radio_model."
_CONDITIONER = {
    "norm_mean": (0.48145466, 0.4578275, 0.40821073),
    "norm_std": (0.26862954, 0.26130258, 0.27577711),
}


def constants(parts: Parts) -> dict[str, LazyTensor]:
    """Return what Megatron's converter adds to RADIO: mean and deviation of its input's colours."""
    if parts["vision"].family != "radio":
        return {}
    return {
        f"{_RADIO}input_conditioner.{name}": concat(
            [Filled("float32", (1, 1, 1), value) for value in values]
        )
        for name, values in _CONDITIONER.items()
    }


def check(parts: Parts) -> None:
    """Raise a SchemaError unless Megatron's converter has names for these parts."""
    vision, projection, language = (parts[part] for part in ("vision", "projection", "language"))
    held = (
        (vision.family in TOWERS_HELD, f"the vision tower {vision.family}"),
        (projection.family == "mlp", f"a projection of type {projection.family}"),
        (language.family in LANGUAGES, f"a language model of family {language.family}"),
    )
    if reasons := [reason for fits, reason in held if not fits]:
        raise SchemaError(f"hf_llava has no names for: {', '.join(reasons)}")


def config_from_parts(parts: Parts) -> dict[str, Any]:
    """Return the ``config.json`` that says what the weights do not."""
    check(parts)
    return {
        "architectures": ["LLaVAModel"],
        "model_type": MODEL_TYPE,
        "text_config": family_named(parts["language"].family).to_config(parts["language"]),
        "vision_config": _plain(parts["vision"]),
        "projection_config": _plain(parts["projection"]),
    }


def _plain(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.dimensions().items() if value not in (None, (), {})}


def parts_from(
    config: Mapping[str, Any] | None, tensors: Mapping[str, LazyTensor]
) -> dict[str, ModelSpec]:
    """Return the dimensions of every part.

    Args:
        config: ours, or that of the language model alone.
        tensors: the weights by name.

    Raises:
        SchemaError: nothing says the language model, or names are of no known tower.
    """
    text = (config or {}).get("text_config") or config or {}
    family = text.get("model_type")
    if family not in LANGUAGES:
        raise SchemaError(
            "nothing says the sizes of the language model: give --hf-base with a config of "
            f"{', '.join(LANGUAGES)} (found model_type {family!r})"
        )
    named = family_named(family)
    language = named.from_config({**text, "architectures": list(named.architectures)})
    if config is not None and config.get("model_type") == MODEL_TYPE:
        noted = {part: _noted(config, f"{part}_config") for part in ("vision", "projection")}
        return {**noted, "language": language}
    vision = _vision(tensors)
    first = _shape(tensors, "mlp1.1.weight")
    out = _shape(tensors, "mlp1.3.weight")[0]
    projection = projection_spec(
        kind="mlp",
        input_size=first[1],
        ffn_hidden_size=first[0],
        hidden_size=out,
        add_bias_linear="mlp1.1.bias" in tensors,
        normalization=norm_among(tensors, "mlp1.0."),
    )
    return {"vision": vision, "projection": projection, "language": language}


def _noted(config: Mapping[str, Any], key: str) -> ModelSpec:
    try:
        return ModelSpec(**{"vocab_size": None, **config[key]})
    except (TypeError, KeyError) as error:
        raise SchemaError(f"config.json: {key} is not what ckptx has written: {error}") from error


def _vision(tensors: Mapping[str, LazyTensor]) -> ModelSpec:
    """Return the dimensions of a tower that its names and shapes say."""
    radio = any(name.startswith(_RADIO) for name in tensors)
    layers = f"{_RADIO}model.blocks." if radio else f"{_VIT}encoder.layers."
    first = f"{layers}0."
    if radio:
        name = "radio"
    elif f"{first}self_attn.q_proj.weight" in tensors:
        name = "siglip"
    elif f"{first}attn.q_norm.weight" in tensors:
        name = "internvit"
    else:
        raise SchemaError(
            "the names are of no vision tower that Megatron's converter writes "
            f"({', '.join(TOWERS_HELD)})"
        )
    channels = TOWERS[name].kv_channels
    hidden = _shape(tensors, f"{first}mlp.fc1.weight")[1]
    if hidden % channels:
        raise SchemaError(
            f"the tower {name} is {hidden} wide, which is no number of heads of {channels}"
        )
    token: tuple[int, ...] = ()
    if radio:
        generator = f"{_RADIO}model.patch_generator."
        patch = round((_shape(tensors, f"{generator}embedder.weight")[1] / 3) ** 0.5)
        positions = _shape(tensors, f"{generator}pos_embed")[1]
        token = _shape(tensors, f"{generator}cls_token.token")
    else:
        patch = _shape(tensors, f"{_VIT}embeddings.patch_embedding.weight")[-1]
        table = "position_embedding.weight" if name == "siglip" else "position_embedding"
        positions = _shape(tensors, f"{_VIT}embeddings.{table}")[-2]
        if name != "siglip":
            token = _shape(tensors, f"{_VIT}embeddings.class_embedding")
    numbers = {n.removeprefix(layers).partition(".")[0] for n in tensors if n.startswith(layers)}
    return tower_spec(
        name,
        num_layers=len(numbers),
        hidden_size=hidden,
        ffn_hidden_size=_shape(tensors, f"{first}mlp.fc1.weight")[0],
        num_attention_heads=hidden // channels,
        positions=positions,
        patch_size=patch,
        extra={"class_tokens": token[-2] if token else 0, "normed_features": name == "siglip"},
    )


def _shape(tensors: Mapping[str, LazyTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise SchemaError(f"there is no {name!r}, which says a size of the model")
    return tensors[name].shape
