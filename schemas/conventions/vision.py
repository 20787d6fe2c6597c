"""Vision towers and projections of vision-language models: names of their tensors.

Megatron builds a tower from the layers of its GPT model, so their rules are those of
`ckptx.schemas.conventions.mcore` under another prefix; what a tower has besides is listed here.
Canonical names are those of Megatron's converter.

Source: NVIDIA/Megatron-LM
megatron/core/models/vision/{clip_vit_model,radio,multimodal_projector}.py,
examples/multimodal/{layer_specs,layer_scaling}.py, examples/multimodal/nvlm/internvit.py,
examples/multimodal/radio/radio_g.py, tools/checkpoint/{loader_llava,schema_hf}.py @ core_v0.16.1;
huggingface/transformers src/transformers/models/{clip,siglip,llava}/modeling_*.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptx.model.canonical_names import RADIO_CLASS
from ckptx.model.layout import ExtraState, Predicate, Rule, Section, rule
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import QKV, drop_unit_axes
from ckptx.schemas.config.traits import Biases
from ckptx.schemas.conventions import blocks
from ckptx.schemas.conventions.blocks import both, linear, moe, norm, only_for
from ckptx.schemas.conventions.mcore import LAYER, Style, extra_states, mcore_gpt

EMBEDDINGS, VISION_LAYER, HEAD = "vit embeddings", "vit transformer layer {layer}", "vit head"
PROJECTION = "vision projection"
VISION_MODEL, VISION_PROJECTION = "vision_model.", "vision_projection.encoder."
"""The prefixes that Megatron's names have."""


_EVERYWHERE = Biases(True, True, True)


@dataclass(frozen=True, slots=True)
class Tower:
    """What Megatron's examples fix for a tower by its name; sizes are those of the published one.

    Source: NVIDIA/Megatron-LM examples/multimodal/config.py, get_vision_model_config @
    core_v0.16.1.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    activation: str
    norm_epsilon: float | None = 1e-6
    """None where it is that of the language model."""
    normalization: str = "LayerNorm"
    biases: Biases = _EVERYWHERE
    class_tokens: int = 1
    post_norm: bool = False


TOWERS: Mapping[str, Tower] = {
    "clip": Tower(24, 1024, 4096, 64, "quick_gelu", None),
    "siglip": Tower(27, 1152, 4304, 72, "gelu_tanh", class_tokens=0, post_norm=True),
    "internvit": Tower(45, 3200, 12800, 128, "gelu", 1e-6, "RMSNorm", Biases(False, True, True)),
    "internvit300M": Tower(24, 1024, 4096, 64, "gelu"),
    "radio": Tower(32, 1280, 5120, 80, "gelu_tanh", class_tokens=8),
    "radio-g": Tower(40, 1536, 4096, 64, "swiglu", class_tokens=5, post_norm=True),
    "cradio-g": Tower(40, 1536, 6144, 64, "gelu_tanh", class_tokens=8),
}
"""By ``vision_model_type``; Megatron's ``fast_gelu`` is the tanh form of Gelu."""


def of(*families: str) -> Predicate:
    """Return the predicate of some towers, or of one kind of projection."""
    return lambda spec: spec.family in families


def having(name: str) -> Predicate:
    """Return the predicate of towers whose ``extra`` says that they have something."""
    return lambda spec: bool(spec.extra.get(name))


_APART = of("internvit", "internvit300M")
"""Norms are modules of their own, whatever the linear layers are."""
_SCALED = of("internvit", "internvit300M", "radio-g")
_RADIO = of("radio", "radio-g", "cradio-g")
_CONVOLVED = of("clip", "siglip", "internvit", "internvit300M")
_CONV_BIAS = of("siglip", "internvit", "internvit300M")
_CLASS_TOKEN, _POST_NORM = having("class_tokens"), having("post_norm")
_TWO_LAYERS, _ONE_LAYER = of("mlp"), of("affine")


def _together(spec: ModelSpec) -> bool:
    return not _APART(spec)


def _normed(spec: ModelSpec) -> bool:
    return spec.normalization != "none"


def _no_norm(spec: ModelSpec) -> bool:
    return not _normed(spec)


def _biased(spec: ModelSpec) -> bool:
    return spec.add_bias_linear


def tower_spec(
    name: str, *, positions: int, patch_size: int, extra: Mapping[str, Any], **sizes: Any
) -> ModelSpec:
    """Return the dimensions of a tower; what is not given is what Megatron fixes for its name.

    ``positions`` are the rows of the position embeddings. Keys of ``extra``: ``class_tokens``,
    ``post_norm``, ``pooling_head``, ``feature_layer`` and ``select``, which are Hugging Face's
    ``vision_feature_layer`` and ``vision_feature_select_strategy``. ``sizes`` are attributes of
    the spec.
    """
    tower = TOWERS[name]
    switches, biases = tower.biases.to_spec()
    values = {
        "architecture": RADIO_CLASS if "radio" in name else "CLIPViTModel",
        "num_query_groups": sizes["num_attention_heads"],
        "kv_channels": tower.kv_channels,
        "norm_epsilon": tower.norm_epsilon or 1e-5,
        "normalization": tower.normalization,
        "activation": tower.activation,
        **switches,
        **sizes,
    }
    own = {"class_tokens": tower.class_tokens, "post_norm": tower.post_norm, "feature_layer": -1}
    return ModelSpec(
        name,
        vocab_size=None,
        max_position_embeddings=positions,
        position_embedding_type="learned_absolute",
        extra={"patch_size": patch_size, **own, "select": "full", **biases, **extra},
        **values,
    )


def projection_spec(
    kind: str, input_size: int, extra: Mapping[str, Any] | None = None, **sizes: Any
) -> ModelSpec:
    """Return the dimensions of a projection from vision to language: ``mlp`` or ``affine``.

    ``sizes`` are attributes of the spec; ``hidden_size`` is the size of what comes out, and an
    affine one has no other.
    """
    return ModelSpec(
        kind,
        "MultimodalProjector",
        num_layers=0,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=sizes["hidden_size"],
        vocab_size=None,
        max_position_embeddings=0,
        norm_epsilon=1e-5,
        position_embedding_type="none",
        extra={"input_size": input_size, **(extra or {})},
        **{"normalization": "none", "activation": "gelu", **sizes},
    )


def norm_among(names: Container[str], prefix: str) -> str:
    """Return what kind of norm the tensors are that some prefix begins, ``none`` without any."""
    if f"{prefix}weight" not in names:
        return "none"
    return "LayerNorm" if f"{prefix}bias" in names else "RMSNorm"


# Megatron


def _megatron_layer(style: Style) -> Iterator[Rule]:
    """Yield the rules of a tower's layer: those of a GPT layer, and what towers add."""
    rules = {
        local: _gpt_layer(replace(style, local=local, distributed=False)) for local in (True, False)
    }
    yield rule("ls1", f"{LAYER}ls1", when=_SCALED)
    yield rule("ls2", f"{LAYER}ls2", when=_SCALED)
    for entry in rules[style.local]:
        if not entry.keys[0].startswith(("input norm", "pre mlp norm")):
            yield entry
    for name in ("q", "k"):
        weight = f"{LAYER}self_attention.{name}_layernorm.weight"
        yield rule(f"{name} norm weight", weight, tp=0, when=of("internvit"))
    for local, when in ((style.local, _together), (True, _APART)):
        for entry in rules[local]:
            if entry.keys[0].startswith(("input norm", "pre mlp norm")):
                yield replace(entry, when=both(entry.when, when))


def _gpt_layer(style: Style) -> list[Rule]:
    """Return the rules of a dense GPT layer, with the keys that Megatron gives a tower's."""
    (section,) = (s for s in mcore_gpt(style).sections if s.message.startswith("transformer"))
    return [
        replace(entry, keys=tuple(k.replace("post norm", "pre mlp norm") for k in entry.keys))
        for entry in section.rules
        if entry.layers is not moe and not entry.keys[0].startswith(("q norm", "k norm"))
    ]


def megatron_sections(style: Style) -> tuple[Section, ...]:
    """Return the sections of tower and projection in one of Megatron's spellings."""
    embeddings = (
        rule("mask token", "mask_token", when=of("radio-g")),
        rule("class token", "class_token", when=_CLASS_TOKEN),
        rule("position embeddings", "position_embeddings", when=_RADIO),
        *linear("embedder", "embedder", tp=0, when=_RADIO, bias=of("radio-g")),
        *linear("ln pre", "ln_pre", when=of("clip")),
        *linear("ln post", "ln_post", when=_POST_NORM),
        *linear("conv1", "conv1", when=_CONVOLVED, bias=_CONV_BIAS),
        rule("position embeddings", "position_embeddings.weight", when=_CONVOLVED),
    )
    key, normed = f"{PROJECTION} ", "linear_fc1.layer_norm_"
    with_bias = both(_normed, blocks.layer_norm_bias)
    projection = (
        rule(f"{key}norm weight", f"{normed}weight", when=_normed),
        rule(f"{key}norm bias", f"{normed}bias", when=with_bias),
        *linear(f"{key}l0", "linear_fc1", tp=0, when=_TWO_LAYERS, bias=_biased),
        *linear(f"{key}l1", "linear_fc2", tp=1, when=_TWO_LAYERS, bias=_biased),
        rule(f"{key}l0 weight", "weight", tp=0, when=_ONE_LAYER),
        rule(f"{key}l0 bias", "bias", tp=0, when=both(_ONE_LAYER, _biased)),
    )
    return (
        Section(EMBEDDINGS, embeddings, part="vision").under("", VISION_MODEL),
        Section(VISION_LAYER, tuple(_megatron_layer(style)), part="vision").under("", VISION_MODEL),
        Section(PROJECTION, projection, part="projection").under("", VISION_PROJECTION),
    )


def megatron_states(style: Style) -> Iterator[ExtraState]:
    """Yield the modules of tower and projection that keep an extra state.

    Norms around the layers are Transformer Engine's in every style.
    """
    engine = not style.local
    for module, when in (("ln_pre", of("clip")), ("ln_post", _POST_NORM)):
        yield ExtraState(EMBEDDINGS, VISION_MODEL + module, True, when)
    yield ExtraState(EMBEDDINGS, f"{VISION_MODEL}embedder", False, _RADIO)
    for state in extra_states(style):
        if state.message.startswith("transformer layer") and state.layers is not moe:
            yield replace(state, message=VISION_LAYER, module=VISION_MODEL + state.module)
    for module in ("linear_fc1", "linear_fc2"):
        # With a norm before it the projection is Transformer Engine's, whatever the layers are.
        place = VISION_PROJECTION + module
        yield ExtraState(PROJECTION, place, True, both(_TWO_LAYERS, _normed))
        yield ExtraState(PROJECTION, place, engine, both(_TWO_LAYERS, _no_norm))
    yield ExtraState(PROJECTION, VISION_PROJECTION.removesuffix("."), engine, _ONE_LAYER)


# Hugging Face


def hf_sections(prefix: str, *others: str) -> tuple[Section, ...]:
    """Return the sections of a CLIP or SigLIP tower as transformers names them."""
    layer, table = "encoder.layers.{layer}.", "embeddings."
    embeddings = (
        rule("class token", f"{table}class_embedding", drop_unit_axes(2), when=_CLASS_TOKEN),
        *linear("conv1", f"{table}patch_embedding", bias=_CONV_BIAS),
        rule("position embeddings", f"{table}position_embedding.weight"),
        *linear("ln pre", "pre_layrnorm", when=of("clip")),
        *linear("ln post", "post_layernorm", when=_POST_NORM),
    )
    layers = (
        *separate_attention(layer),
        *tower_norms(f"{layer}layer_norm1", f"{layer}layer_norm2"),
        *tower_mlp(layer),
    )
    messages = {EMBEDDINGS: embeddings, VISION_LAYER: layers, HEAD: _pooling("head.")}
    return tuple(
        Section(message, rules, part="vision").under("", prefix, *others)
        for message, rules in messages.items()
    )


def separate_attention(layer: str) -> tuple[Rule, ...]:
    """Return the rules of an attention with projections of their own, as CLIP has it."""
    names = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    return (
        *linear("qkv", names, QKV, bias=blocks.qkv_bias),
        *linear("dense", f"{layer}self_attn.out_proj", bias=blocks.dense_bias),
    )


def tower_norms(before: str, after: str) -> tuple[Rule, ...]:
    """Return the rules of the norms before attention and MLP."""
    return (*norm("input norm", before), *norm("pre mlp norm", after))


def tower_mlp(layer: str) -> tuple[Rule, ...]:
    """Return the rules of an MLP that is gated or not, as Megatron's converter names it."""
    plain = (
        *linear("mlp l0", f"{layer}mlp.fc1", bias=blocks.mlp_bias),
        *linear("mlp l1", f"{layer}mlp.fc2", bias=blocks.mlp_bias),
    )
    return (*only_for(blocks.gated, *blocks.hf_gated_mlp(layer)), *only_for(blocks.ungated, *plain))


def _pooling(head: str) -> tuple[Rule, ...]:
    attention = f"{head}attention."
    return only_for(
        having("pooling_head"),
        rule("probe", f"{head}probe"),
        rule("qkv weight", f"{attention}in_proj_weight"),
        rule("qkv bias", f"{attention}in_proj_bias"),
        *linear("dense", f"{attention}out_proj"),
        *linear("norm", f"{head}layernorm"),
        *linear("mlp l0", f"{head}mlp.fc1"),
        *linear("mlp l1", f"{head}mlp.fc2"),
    )


def projection_section(*names: str) -> Section:
    """Return the section of a projection; ``names`` are those of norm, first and second layer.

    An empty name is a layer that the convention has not.
    """
    before, first, second = names
    key = f"{PROJECTION} "
    rules = (
        *(norm(f"{key}norm", before, _normed) if before else ()),
        *linear(f"{key}l0", first, bias=_biased),
        *linear(f"{key}l1", second, when=_TWO_LAYERS, bias=_biased),
    )
    return Section(PROJECTION, rules, part="projection")
