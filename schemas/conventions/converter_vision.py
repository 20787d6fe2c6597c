"""The names that Megatron's converter gives to the tensors of vision towers.

Source: NVIDIA/Megatron-LM tools/checkpoint/{loader_llava,schema_hf}.py @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptx.model.layout import Predicate, Rule, Section, always, rule
from ckptx.model.transforms import FUSED_QKV
from ckptx.schemas.conventions.blocks import dense_bias, qkv_bias
from ckptx.schemas.conventions.mcore import both
from ckptx.schemas.conventions.vision import (
    EMBEDDINGS,
    VISION_LAYER,
    of,
    separate_attention,
    tower_mlp,
    tower_norms,
)


def converter_sections(prefix: str) -> tuple[Section, ...]:
    """Return the sections of the towers for which Megatron's converter has names.

    InternViT and RADIO keep query, key and value in one tensor, all of query first.
    """
    vit, radio = f"{prefix}vision_model.", f"{prefix}radio_model."
    layers = _layers(f"{vit}encoder.layers.{{layer}}.", f"{radio}model.blocks.{{layer}}.")
    return (
        Section(EMBEDDINGS, _embeddings(vit, radio), part="vision"),
        Section(VISION_LAYER, layers, part="vision"),
    )


def _embeddings(vit: str, radio: str) -> tuple[Rule, ...]:
    generator = f"{radio}model.patch_generator."
    return (
        *_only(
            of("internvit"),
            rule("conv1 weight", f"{vit}embeddings.patch_embedding.weight"),
            rule("conv1 bias", f"{vit}embeddings.patch_embedding.bias"),
            rule("position embeddings", f"{vit}embeddings.position_embedding"),
            rule("class token", f"{vit}embeddings.class_embedding"),
        ),
        *_only(
            of("siglip"),
            rule("conv1 weight", f"{vit}embeddings.patch_embedding.weight"),
            rule("conv1 bias", f"{vit}embeddings.patch_embedding.bias"),
            rule("ln post weight", f"{vit}post_layernorm.weight"),
            rule("ln post bias", f"{vit}post_layernorm.bias"),
            rule("position embeddings", f"{vit}embeddings.position_embedding.weight"),
        ),
        *_only(
            of("radio"),
            rule("embedder weight", f"{generator}embedder.weight"),
            rule("class token", f"{generator}cls_token.token"),
            rule("position embeddings", f"{generator}pos_embed"),
        ),
    )


def _layers(layer: str, block: str) -> tuple[Rule, ...]:
    return (
        *_only(
            of("internvit"),
            rule("ls1", f"{layer}ls1"),
            rule("ls2", f"{layer}ls2"),
            *tower_norms(f"{layer}norm1", f"{layer}norm2"),
            *_fused_attention(f"{layer}attn."),
            *tower_mlp(layer),
            rule("q norm weight", f"{layer}attn.q_norm.weight"),
            rule("k norm weight", f"{layer}attn.k_norm.weight"),
        ),
        *_only(
            of("siglip"),
            *tower_norms(f"{layer}layer_norm1", f"{layer}layer_norm2"),
            *separate_attention(layer),
            *tower_mlp(layer),
        ),
        *_only(
            of("radio"),
            *tower_norms(f"{block}norm1", f"{block}norm2"),
            *_fused_attention(f"{block}attn."),
            *tower_mlp(block),
        ),
    )


def _fused_attention(attention: str) -> tuple[Rule, ...]:
    return (
        rule("qkv weight", f"{attention}qkv.weight", FUSED_QKV),
        rule("qkv bias", f"{attention}qkv.bias", FUSED_QKV, when=qkv_bias),
        rule("dense weight", f"{attention}proj.weight"),
        rule("dense bias", f"{attention}proj.bias", when=dense_bias),
    )


def _only(when: Predicate, *rules: Rule) -> Iterator[Rule]:
    """Yield the rules for the models that ``when`` holds of."""
    for entry in rules:
        yield replace(entry, when=when if entry.when is always else both(when, entry.when))
