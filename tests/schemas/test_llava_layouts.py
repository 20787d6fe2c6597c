"""The layouts of a LLaVA: names, keys and axes of every part, whatever the tower."""

from __future__ import annotations

import pytest

from ckptx.model.canonical_names import keys_of
from ckptx.schemas.conventions.vision import TOWERS, projection_spec, tower_spec
from ckptx.schemas.families.multimodal.hf_llava import TOWERS_HELD
from ckptx.schemas.families.multimodal.llava import CONVERTER, used
from ckptx.schemas.families.multimodal.llava import FAMILY as LLAVA
from ckptx.schemas.families.multimodal.llava_config import parts_from_config


def parts(tower, projection="mlp"):
    vision = tower_spec(
        tower,
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=80,
        num_attention_heads=2,
        positions=17,
        patch_size=7,
        extra={"pooling_head": tower == "siglip"},
    )
    projected = projection_spec(
        kind=projection,
        input_size=128,
        ffn_hidden_size=64,
        hidden_size=64,
        add_bias_linear=True,
        normalization="LayerNorm" if projection == "mlp" else "none",
    )
    text = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
    language = parts_from_config({"text_config": text})["language"]
    return {"vision": vision, "projection": projected, "language": language}


CASES = [
    (convention, tower)
    for convention in LLAVA.layouts
    for tower in TOWERS
    if convention != "hf" or tower in ("clip", "siglip")
    if convention != CONVERTER or tower in TOWERS_HELD
]


@pytest.mark.parametrize("projection", ["mlp", "affine"])
@pytest.mark.parametrize(("convention", "tower"), CASES)
def test_names_are_disjoint_and_keys_are_in_the_vocabulary(convention, tower, projection):
    layout = LLAVA.layout(convention)
    seen: set[str] = set()
    messages = set()
    for held in layout.held(used(parts(tower, projection))):
        assert held.message not in messages
        messages.add(held.message)
        known = keys_of(held.message, held.spec)
        keys = [key for entry in held.rules for key in entry.keys]
        assert len(set(keys)) == len(keys)
        assert set(keys) <= set(known)
        for entry in held.rules:
            for key in entry.keys:
                if "mcore" in convention and known[key].tp is not None:
                    assert entry.tp == known[key].tp, f"{held.message}: {key}"
            for spelling in entry.spellings:
                names = set(spelling.named(held.layer, 0))
                assert not names & seen
                seen |= names
    assert not [name for name in seen if name.endswith(layout.ignored)]


@pytest.mark.parametrize(
    ("layers", "chosen", "left"), [(24, -2, 23), (24, -1, 24), (24, 12, 12), (1, -1, 1)]
)
def test_layers_behind_the_features_are_not_used(layers, chosen, left):
    config = {
        "vision_feature_layer": chosen,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": layers,
        },
    }
    vision = used(parts_from_config(config))["vision"]
    assert (vision.num_layers, vision.extra["feature_layer"]) == (left, -1)


def test_defaults_are_those_of_the_config_classes():
    """Of LLaVA 1.5, whose config on the hub leaves out what its class says."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaConfig()
    found = parts_from_config({"architectures": ["LlavaForConditionalGeneration"]})
    vision, language = found["vision"], found["language"]
    assert vision.hidden_size == theirs.vision_config.hidden_size
    assert vision.num_layers == theirs.vision_config.num_hidden_layers
    assert vision.ffn_hidden_size == theirs.vision_config.intermediate_size
    assert vision.max_position_embeddings == 1 + (336 // 14) ** 2
    assert vision.extra["feature_layer"] == theirs.vision_feature_layer
    assert vision.extra["select"] == theirs.vision_feature_select_strategy
    assert found["projection"].extra["image_token_index"] == theirs.image_token_index
    assert language.hidden_size == theirs.text_config.hidden_size
    assert language.vocab_size == theirs.text_config.vocab_size
    for kind, config in (
        ("clip_vision_model", transformers.CLIPVisionConfig()),
        ("siglip_vision_model", transformers.SiglipVisionConfig()),
    ):
        vision = parts_from_config({"vision_config": {"model_type": kind}})["vision"]
        assert vision.num_layers == config.num_hidden_layers
        assert vision.hidden_size == config.hidden_size
        assert vision.norm_epsilon == config.layer_norm_eps
        assert vision.extra["patch_size"] == config.patch_size
        assert vision.extra["pooling_head"] is getattr(config, "vision_use_head", False)
