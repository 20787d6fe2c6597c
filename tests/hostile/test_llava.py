"""Vision-language models whose parts are unknown, incomplete, or not of one model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from ckptx.cli import main as cli
from tests.oracles import llava

RANKS = ("--to", "llava", "--ckpt-format", "torch", "--quiet")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Models of transformers by tower, and their Megatron forms."""
    place = tmp_path_factory.mktemp("llava")
    for tower in ("clip", "siglip"):
        llava.write(place / tower, llava.config(tower))
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(place / "clip"), str(place / "core"), *RANKS])
    assert not end.value.code
    return place


@pytest.fixture
def model(user, written):
    """A model of transformers as the source; returns how to change its config."""

    def chosen(tower="clip", **changes):
        shutil.copytree(written / tower, user.source, dirs_exist_ok=True)
        file = user.source / "config.json"
        config = json.loads(file.read_text())
        for key, value in changes.items():
            whole, _, inner = key.partition("__")
            if inner:
                config[whole][inner] = value
            else:
                config[key] = value
        file.write_text(json.dumps(config))

    return chosen


@pytest.fixture
def ranks(user, written):
    """A Megatron form with CLIP in one file as the source, and how to change its state."""

    def chosen(edit=None):
        shutil.copytree(written / "core", user.source)
        if edit is not None:
            (file,) = user.source.rglob("model_optim_rng.pt")
            state = torch.load(file, weights_only=False)
            edit(state)
            torch.save(state, file)

    return chosen


CONFIGS = [
    ({"vision_config__model_type": "dinov2"}, "'dinov2' is an unknown vision tower; known are"),
    ({"text_config__model_type": "gemma"}, "model_type 'gemma' is no language model that a"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', known are"),
    ({"vision_config__num_hidden_layers": 2}, "not part of it: 'vision_tower.encoder.layers.2"),
    ({"vision_config__image_size": 35}, "'position embeddings' is [17, 128]"),
    ({"vision_feature_layer": -9}, "vision_feature_layer -9 is none of the tower's 3 layers"),
]
MORE_CONFIGS = [
    ({"vision_config__hidden_act": "relu"}, "vision_config: hidden_act is 'relu', known are"),
    ({"vision_config__num_attention_heads": 3}, "128 does not divide over 3 heads"),
    ({"vision_config__num_channels": 1}, "1 channels per pixel, expected 3"),
    ({"vision_config__num_hidden_layers": 4}, "missing: 'vision_tower.vision_model.encoder"),
    ({"vision_config__patch_size": 14}, "the model's dimensions say"),
    ({"text_config__num_hidden_layers": 5}, "missing: 'language_model.model.layers.4"),
    ({"multimodal_projector_bias": False}, "not part of it: 'multi_modal_projector.linear_1.b"),
    ({"vision_feature_layer": [-2, -1]}, "'vision projection l0 weight' is [64, 128]"),
]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [*CONFIGS, *(pytest.param(*one, marks=pytest.mark.full) for one in MORE_CONFIGS)],
)
def test_configs_that_do_not_fit(changes, reason, user, model):
    model(**changes)
    assert reason in user.cannot_convert("llava")


def test_features_of_several_layers(user, model):
    model(vision_feature_layer=[-2, -1])
    weights = load_file(user.source / "model.safetensors")
    weights["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 256)
    save_file(weights, user.source / "model.safetensors")
    assert "features of several layers side by side" in user.cannot_convert("llava")
    assert user.run("convert", user.source, user.target, "--to", "hf", "--quiet") == 0


def test_first_patch_left_out(user, model):
    model("siglip", vision_feature_select_strategy="default")
    assert "the first patch would be left out" in user.cannot_convert("llava")


@pytest.mark.parametrize(
    "name", ["vision_tower.pre_layrnorm.bias", "multi_modal_projector.linear_2.weight"]
)
def test_missing_tensor(name, user, model):
    model()
    weights = load_file(user.source / "model.safetensors")
    del weights[name]
    save_file(weights, user.source / "model.safetensors")
    assert name.rpartition(".")[0].rpartition(".")[2] in user.cannot_convert("llava")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tp", "4"), "size 4 does not divide the tower's num_attention_heads 2"),
        (("--pp", "3"), "4 layers do not fit pipeline size 3"),
        (("--pp", "2", "--vpp", "2"), "virtual stages were asked for: Megatron's LLaVA has none"),
    ],
)
def test_sizes_that_do_not_divide(options, reason, user, model):
    model()
    assert reason in user.cannot_convert("llava", *options)


def without(name):
    def edit(state):
        del state["model"][name]

    return edit


def with_args(**changes):
    def edit(state):
        vars(state["args"]).update(changes)

    return edit


def without_projection(state):
    for name in [name for name in state["model"] if name.startswith("vision_projection.")]:
        del state["model"][name]


def with_another_projection(state):
    without_projection(state)
    state["model"]["vision_projection.encoder.resampler.query"] = torch.zeros(4, 64)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (with_args(vision_model_type="dinov2"), "'dinov2' is no vision tower that ckptx knows"),
        (with_args(encoder_pipeline_model_parallel_size=1), "the tower has parallel sizes of its"),
        (with_args(encoder_tensor_model_parallel_size=2), "the tower has parallel sizes of its"),
        (with_args(vision_model_type="siglip"), "mp_rank_00: vision_model.conv1.bias"),
        (without("vision_model.ln_pre.bias"), "missing: 'mp_rank_00: vision_model.ln_pre.bias'"),
        (
            without("vision_model.decoder.layers.0.self_attention.linear_proj.weight"),
            "holds no 'vision_model.decoder.layers.0.self_attention.linear_proj.weight'",
        ),
        (without("vision_projection.encoder.linear_fc2.weight"), "'vision_projection.encoder.lin"),
        (without_projection, "holds no vision_projection: its model cannot see"),
        (with_another_projection, "vision_projection is neither an mlp nor affine"),
    ],
)
def test_ranks_that_do_not_fit(edit, reason, user, ranks):
    ranks(edit=edit)
    assert reason in user.cannot_convert("hf")


def affine(state):
    without_projection(state)
    state["model"]["vision_projection.encoder.weight"] = torch.zeros(64, 128)


def test_affine_projection_stays_in_megatron(user, ranks):
    ranks(edit=affine)
    assert "a projection of type affine" in user.cannot_convert("hf")
    assert user.run("convert", user.source, user.target, *RANKS, "--tp", "2") == 0


def test_dummy_heads_that_are_not_there(user, ranks):
    ranks()
    option = ("--from", "llava", "--vit-dummy-head-count", "7")
    assert "is 7, the weights have 0" in user.cannot_convert("llava", *option)


def test_models_without_vision(user, write_llama, megatron):
    write_llama(user.source)
    assert "no vision tower, so it is no LLaVA; use --saver core" in user.cannot_convert("llava")
    assert "no vision tower, so it is no LLaVA; use --saver hf" in user.cannot_convert("hf_llava")
    shutil.rmtree(user.source)
    shutil.copytree(megatron / "torch", user.source)
    reason = user.cannot_convert("hf", "--from", "llava")
    assert "holds no vision_model, so it is no LLaVA; use --loader core" in reason


def test_names_that_the_converter_has_not(user, model):
    model("clip")
    assert "hf_llava has no names for: the vision tower clip" in user.cannot_convert("hf_llava")


def test_converters_names_without_a_language_model(user, model):
    model("siglip")
    apart = user.place / "apart"
    assert user.run("convert", user.source, apart, "--to", "hf_llava", "--quiet") == 0
    shutil.rmtree(user.source)
    apart.rename(user.source)
    (user.source / "config.json").unlink()
    reason = user.cannot_convert("llava", "--from", "hf_llava")
    assert "nothing says the sizes of the language model: give --hf-base" in reason


def test_base_of_another_tower(user, ranks, written):
    ranks()
    reason = user.cannot_convert("hf", "--hf-base", written / "siglip")
    assert "the vision tower siglip, the weights clip" in reason
