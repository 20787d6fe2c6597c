"""LLaVA: a vision tower, a projection, and a language model that sees what it projects.

The language model is one of the families whose decoder is Llama's in names; its layouts come from
there, under another prefix. `ckptx.schemas.conventions.vision` has the other two parts.

Megatron's model ends where features are read: all layers of its tower take part. A Hugging Face
model may hold layers behind that, whose number ``vision_feature_layer`` says; `used` leaves them
out.

Source: huggingface/transformers src/transformers/models/llava/{configuration,modeling}_llava.py @
v5.23.0; NVIDIA/Megatron-LM megatron/core/models/multimodal/llava_model.py,
tools/checkpoint/{saver_hf_llava,schema_hf}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.family import Composition, Family, FamilyConfig
from ckptx.model.layout import ExtraState, Layout, Parts, Section
from ckptx.model.spec import ModelSpec
from ckptx.registry.families import family_named
from ckptx.schemas.conventions import mcore
from ckptx.schemas.conventions import vision as towers
from ckptx.schemas.conventions.blocks import hf_decoder
from ckptx.schemas.conventions.converter_vision import converter_sections
from ckptx.schemas.conventions.mcore import Style
from ckptx.schemas.families.multimodal import llava_config
from ckptx.tensors.lazy import Shape

LANGUAGE = "language_model."
CONVERTER = "hf_llava"
"""The convention of Megatron's own names for such a model in Hugging Face files."""


def _hf_language() -> tuple[Section, ...]:
    """Return the language model as the hub has it, and as transformers 5 has it in memory."""
    return tuple(
        section.under("", LANGUAGE, "")
        if section.message == "output layer"
        else section.under("model.", f"{LANGUAGE}model.", f"model.{LANGUAGE}")
        for section in hf_decoder()
    )


def _hf_layout() -> Layout:
    tower = ("vision_tower.vision_model.", "vision_tower.")
    projector = "multi_modal_projector."
    return Layout(
        "hf/llava",
        (
            *towers.hf_sections(*tower, *(f"model.{prefix}" for prefix in reversed(tower))),
            towers.projection_section("", "linear_1", "linear_2").under(
                "", projector, f"model.{projector}"
            ),
            *_hf_language(),
        ),
        ignored=("rotary_emb.inv_freq", "embeddings.position_ids"),
    )


def _converter_layout() -> Layout:
    return Layout(
        "hf/megatron-llava",
        (
            *converter_sections("vision_model."),
            towers.projection_section("mlp1.0", "mlp1.1", "mlp1.3"),
            *(section.under("", LANGUAGE) for section in hf_decoder()),
        ),
        # Constants of RADIO's input, which Megatron's converter writes and its model has not.
        ignored=("input_conditioner.norm_mean", "input_conditioner.norm_std"),
    )


def spelling(style: Style) -> Style:
    """Return the spelling of names that Megatron's LLaVA has in a style.

    Its local layers, unlike those of its GPT model, keep their names in ``torch_dist``.
    """
    return replace(style, distributed=False) if style.local else style


def megatron_layout(style: Style) -> Layout:
    """Return the layout of Megatron's LLaVAModel in one of its spellings."""
    own = spelling(style)
    language = tuple(section.under("", LANGUAGE) for section in mcore.mcore_gpt(own).sections)
    return Layout(
        style.name.replace("gpt", "llava"),
        (*towers.megatron_sections(own), *language),
        ignored=("_extra_state",),
        extra_states=tuple(_states(style)),
    )


def _states(style: Style) -> Iterator[ExtraState]:
    """Yield the modules of Megatron's LLaVAModel that keep an extra state.

    Its towers need Transformer Engine, and where that is, norms of a language model with local
    layers are its, too: the last one, and an RMSNorm.

    Source: NVIDIA/Megatron-LM examples/multimodal/layer_specs.py, get_layer_spec @ core_v0.16.1.
    """
    yield from towers.megatron_states(style)
    if style.local:
        yield ExtraState("final norm", f"{LANGUAGE}decoder.final_layernorm", True)
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            module = f"{LANGUAGE}{mcore.LAYER}{norm}"
            yield ExtraState("transformer layer {layer}", module, True, _rms)
    for state in mcore.extra_states(style):
        yield replace(state, module=LANGUAGE + state.module)


def _rms(spec: ModelSpec) -> bool:
    return spec.normalization == "RMSNorm"


def used(parts: Parts) -> Parts:
    """Return the parts without what lies behind the features: layers, a norm, a pooling head.

    Raises:
        SchemaError: features of several layers are joined.
    """
    vision = parts["vision"]
    layers = _layers_read(vision)
    extra = {**vision.extra, "feature_layer": -1, "pooling_head": False}
    if vision.family == "clip":
        extra["post_norm"] = False
    return {**parts, "vision": replace(vision, num_layers=layers, extra=extra)}


def completed(parts: Parts) -> tuple[Parts, dict[tuple[str, str], tuple[Shape, float]]]:
    """Return the parts with CLIP's norm behind the features, and what fills it.

    Megatron's CLIP has none, transformers' has one that no feature goes through.
    """
    vision = parts["vision"]
    if vision.family != "clip" or vision.extra["post_norm"]:
        return parts, {}
    shape = (vision.hidden_size,)
    whole = replace(vision, extra={**vision.extra, "post_norm": True})
    return {**parts, "vision": whole}, {
        (towers.EMBEDDINGS, "ln post weight"): (shape, 1.0),
        (towers.EMBEDDINGS, "ln post bias"): (shape, 0.0),
    }


def _layers_read(vision: ModelSpec) -> int:
    """Return after how many layers features are read."""
    chosen = vision.extra["feature_layer"]
    if not isinstance(chosen, int):
        raise SchemaError(
            f"vision_feature_layer is {chosen}: features of several layers side by side, which "
            "Megatron's LLaVA cannot take"
        )
    layers = vision.num_layers + 1 + chosen if chosen < 0 else chosen
    if not 0 < layers <= vision.num_layers:
        raise SchemaError(
            f"vision_feature_layer {chosen} is none of the tower's {vision.num_layers} layers"
        )
    return layers


class _LanguageConfig(FamilyConfig):
    """The config of the language part, which is that of its own family."""

    def from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the dimensions of the language part."""
        return llava_config.parts_from_config(config)["language"]

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the config of the language part."""
        return family_named(spec.family).to_config(spec)


FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    model_types=("llava",),
    layouts={
        "hf": _hf_layout(),
        **{style.convention: megatron_layout(style) for style in mcore.STYLES},
        CONVERTER: _converter_layout(),
    },
    config=_LanguageConfig(reason="a config of a LLaVA says more than its language part"),
    composition=Composition(
        from_config=llava_config.parts_from_config,
        to_config=llava_config.config_from_parts,
        differences=llava_config.differences_of,
        merge_config=llava_config.merged_config,
        used=used,
        completed=completed,
    ),
    limits=(
        "language models Llama, Mistral, Qwen2 and Qwen3; CLIP and SigLIP towers to and from "
        "`hf`, InternViT, SigLIP and RADIO to and from `hf_llava`, RADIO-G between Megatron "
        "layouts only",
    ),
)
