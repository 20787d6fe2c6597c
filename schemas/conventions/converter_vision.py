"""The names that Megatron's converter gives to the tensors of vision towers.

Source: NVIDIA/Megatron-LM tools/checkpoint/{loader_llava,schema_hf}.py @ core_v0.16.1.
"""

from __future__ import annotations

from ckptx.model.layout import Rule, Section, rule
from ckptx.model.transforms import FUSED_QKV
from ckptx.schemas.conventions.blocks import dense_bias, linear, only_for, qkv_bias
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
    own, generator = f"{vit}embeddings.", f"{radio}model.patch_generator."
    return (
        *only_for(
            of("internvit"),
            *linear("conv1", f"{own}patch_embedding"),
            rule("position embeddings", f"{own}position_embedding"),
            rule("class token", f"{own}class_embedding"),
        ),
        *only_for(
            of("siglip"),
            *linear("conv1", f"{own}patch_embedding"),
            *linear("ln post", f"{vit}post_layernorm"),
            rule("position embeddings", f"{own}position_embedding.weight"),
        ),
        *only_for(
            of("radio"),
            rule("embedder weight", f"{generator}embedder.weight"),
            rule("class token", f"{generator}cls_token.token"),
            rule("position embeddings", f"{generator}pos_embed"),
        ),
    )


def _layers(layer: str, block: str) -> tuple[Rule, ...]:
    return (
        *only_for(
            of("internvit"),
            rule("ls1", f"{layer}ls1"),
            rule("ls2", f"{layer}ls2"),
            *tower_norms(f"{layer}norm1", f"{layer}norm2"),
            *_fused_attention(f"{layer}attn."),
            *tower_mlp(layer),
            rule("q norm weight", f"{layer}attn.q_norm.weight"),
            rule("k norm weight", f"{layer}attn.k_norm.weight"),
        ),
        *only_for(
            of("siglip"),
            *tower_norms(f"{layer}layer_norm1", f"{layer}layer_norm2"),
            *separate_attention(layer),
            *tower_mlp(layer),
        ),
        *only_for(
            of("radio"),
            *tower_norms(f"{block}norm1", f"{block}norm2"),
            *_fused_attention(f"{block}attn."),
            *tower_mlp(block),
        ),
    )


def _fused_attention(attention: str) -> tuple[Rule, ...]:
    return (
        *linear("qkv", f"{attention}qkv", FUSED_QKV, bias=qkv_bias),
        *linear("dense", f"{attention}proj", bias=dense_bias),
    )
