"""LLaVA: transformers and real Megatron Core compute the same from what is converted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from ckptx.verification import compare
from tests.oracles import hf, llava
from tests.oracles.mcore import Layout

from .conversion import CLOSE, IMPLEMENTATIONS, convert, difference, sizes

FORMATS = ("torch_dist", "torch")
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2-pp2": Layout(tp=2, pp=2),
}


# What two of three axes have not met elsewhere; the full suite has all of it.
EVERYDAY = {
    ("clip", "tp1", "torch"),
    ("clip", "tp2-pp2", "torch_dist"),
    ("siglip", "tp2", "torch_dist"),
    ("siglip", "tp2-pp2", "torch"),
}
GRID = [
    pytest.param(*one, marks=[] if one in EVERYDAY else [pytest.mark.full])
    for one in product(("clip", "siglip"), LAYOUTS, FORMATS)
]
EVERYDAY_TOWERS = {
    ("clip", "local"),
    ("siglip", "te"),
    ("internvit", "te"),
    ("radio", "local"),
    ("radio-g", "te"),
}
TOWERS = [
    pytest.param(*one, marks=[] if one in EVERYDAY_TOWERS else [pytest.mark.full])
    for one in product(llava.TOWERS, IMPLEMENTATIONS)
]


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """A model of transformers, what it computes and its config."""

    @cache
    def written(tower, language="llama"):
        directory = tmp_path_factory.mktemp(f"{tower}-{language}") / "hf"
        config = llava.write(directory, llava.config(tower, language))
        return directory, config, llava.computed(directory)

    return written


def same(found, expected):
    """Nothing of what both have computed differs; the vocabulary may be padded.

    Megatron's tower gives the class token's feature, too, which is left out behind it.
    """
    for name in set(found) & set(expected):
        here, there = found[name], expected[name]
        if name == "projected":
            here, there = (one if len(one) == 2 else one.transpose(0, 1) for one in (here, there))
        if name == "features":
            patches = min(here.shape[1], there.shape[1])
            here, there = here[:, -patches:], there[:, -patches:]
        rows = min(here.shape[-1], there.shape[-1])
        assert difference(here[..., :rows], there[..., :rows]) <= CLOSE, name


@pytest.mark.parametrize(("tower", "layout", "format"), GRID)
def test_megatron_computes_what_transformers_does(tower, layout, format, source_of, tmp_path):
    directory, config, expected = source_of(tower)
    layout = LAYOUTS[layout]
    convert(directory, tmp_path / "core", "core", ckpt_format=format, **sizes(layout))
    model = llava.megatron(config, tp=layout.tp)
    found = llava.megatron_reads(model, layout, tmp_path / "core", format=format)
    same(found, expected)


def written_by_megatron(tower, config, layout, directory, format, **args):
    """A checkpoint of Megatron's own, whose args say no size of the tower."""
    # Megatron's SigLIP ends with its norm, as its model_provider builds it.
    model = llava.megatron(config, tp=layout.tp, features_before_norm=False)
    return llava.megatron_writes(model, layout, directory, format=format, args=args)


@pytest.mark.parametrize(("tower", "layout", "format"), GRID)
def test_transformers_computes_what_megatron_does(tower, layout, format, source_of, tmp_path):
    _, config, _ = source_of(tower)
    layout = LAYOUTS[layout]
    expected = written_by_megatron(tower, config, layout, tmp_path / "core", format)
    # Without a config at hand: args and shapes alone say what the model is, but for the number of
    # the image's token, which is the tokenizer's.
    facts = convert(tmp_path / "core", tmp_path / "hf", "hf")
    same(llava.computed(tmp_path / "hf", image_token=llava.IMAGE), expected)
    assert ("takes no part in the output" in " ".join(facts.notes)) is (tower == "clip")


def held(directory):
    """Every tensor of a checkpoint with a file per rank, by rank and name."""
    files = sorted(directory.rglob("model_optim_rng.pt"))
    models = {f.parent.name: torch.load(f, weights_only=False)["model"] for f in files}
    return {
        (rank, name): tensor for rank, model in models.items() for name, tensor in model.items()
    }


@pytest.mark.parametrize(("tower", "layers"), TOWERS)
def test_our_ranks_hold_what_megatrons_hold(tower, layers, tmp_path):
    """Megatron writes one model in three ways; cutting one of them anew gives the others."""
    model = llava.tower(tower, local_layers=layers == "local", projection_norm=tower != "clip")
    two = replace(model, gpt={**model.gpt, "vocab_size": 256})
    for name, layout, format in (
        ("whole", Layout(), "torch_dist"),
        ("ranks", Layout(tp=2, pp=2), "torch"),
    ):
        llava.megatron_writes(two, layout, tmp_path / name, format=format, images=None)
    options = {"saver_transformer_impl": IMPLEMENTATIONS[layers], **sizes(Layout(tp=2, pp=2))}
    convert(tmp_path / "whole", tmp_path / "ours", "llava", ckpt_format="torch", **options)
    ours, theirs = held(tmp_path / "ours"), held(tmp_path / "ranks")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (ours[name] is None) is (tensor is None), name
        if tensor is not None:
            assert torch.equal(ours[name], tensor), name
            assert ours[name].dtype == tensor.dtype
    # And back to one whole, which Megatron loads as it is.
    options = {"saver_transformer_impl": IMPLEMENTATIONS[layers], **sizes(Layout())}
    convert(tmp_path / "ranks", tmp_path / "back", "llava", ckpt_format="torch_dist", **options)
    found = llava.megatron_reads(two, Layout(), tmp_path / "back", images=None)
    expected = llava.megatron_reads(two, Layout(), tmp_path / "whole", images=None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "language",
    [*(pytest.param(one, marks=pytest.mark.full) for one in ("mistral", "qwen2")), "qwen2-tied"],
)
def test_languages_go_there_and_come_back(language, source_of, tmp_path):
    directory, config, expected = source_of("clip", language)
    layout = LAYOUTS["tp2-pp2"]
    convert(directory, tmp_path / "core", "core", **sizes(layout))
    model = llava.megatron(config, tp=layout.tp)
    same(llava.megatron_reads(model, layout, tmp_path / "core"), expected)
    convert(tmp_path / "core", tmp_path / "back", "hf")
    same(llava.computed(tmp_path / "back"), expected)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_round_trip_keeps_what_is_used(tower, source_of, tmp_path):
    directory, _, expected = source_of(tower)
    facts = convert(directory, tmp_path / "core", "llava", **sizes(LAYOUTS["tp2-pp2"]))
    left = {drop["name"].partition(":")[0] for drop in facts.dropped}
    behind = {"clip": {"vit embeddings", "vit transformer layer 2"}, "siglip": {"vit head"}}
    assert left == behind[tower]
    convert(tmp_path / "core", tmp_path / "back", "hf")
    same(llava.computed(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vision_feature_layer"] == -1
    assert config["vision_config"]["num_hidden_layers"] == {"clip": 2, "siglip": 3}[tower]
    for other in (tmp_path / "core", tmp_path / "back"):
        comparison = compare.compare(directory, other)
        assert comparison.equal, comparison.render(80)
        assert "behind the features" in " ".join(comparison.notes)


def as_on_the_hub(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def as_in_memory(name):
    """Transformers 5: the names of a LlavaForConditionalGeneration's own state dict."""
    inner = name.replace("language_model.model.", "language_model.")
    return "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{inner}"


@pytest.mark.parametrize("spelled", [as_on_the_hub, as_in_memory])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_spelling_is_read_and_the_hubs_is_written(tower, spelled, source_of, tmp_path):
    directory, _, expected = source_of(tower)
    weights = hf.weights(directory)
    (tmp_path / "hf").mkdir()
    shutil.copyfile(directory / "config.json", tmp_path / "hf" / "config.json")
    renamed = {spelled(name): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    facts = convert(tmp_path / "hf", tmp_path / "again", "hf")
    assert not facts.dropped
    found = hf.weights(tmp_path / "again")
    assert sorted(found) == sorted(map(as_on_the_hub, weights))
    assert all(torch.equal(found[as_on_the_hub(name)], one) for name, one in weights.items())
    same(llava.computed(tmp_path / "again"), expected)


def test_every_part_is_cast_and_says_so(source_of, tmp_path):
    directory, _, _ = source_of("clip", "qwen2")
    (tmp_path / "hf").mkdir()
    shutil.copyfile(directory / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["torch_dtype"] = "float32"  # as on the hub
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "core", "core", dtype="bfloat16")
    convert(tmp_path / "core", tmp_path / "back", "hf")
    weights = hf.weights(directory)
    found = hf.weights(tmp_path / "back")
    read = [name for name in found if "post_layernorm" not in name]  # that of CLIP is made anew
    assert all(
        torch.equal(found[name], weights[name.replace(".vision_model", "")].bfloat16())
        for name in read
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["torch_dtype"]} == {"bfloat16"}


def test_state_dict_in_one_file(source_of, tmp_path):
    directory, config, expected = source_of("siglip")
    convert(directory, tmp_path / "file", "pytorch")
    found = torch.load(tmp_path / "file" / "model.pt", weights_only=True)
    weights = hf.weights(directory)
    assert sorted(found) == sorted(map(as_on_the_hub, weights))
    assert all(torch.equal(found[as_on_the_hub(name)], one) for name, one in weights.items())
    convert(tmp_path / "file", tmp_path / "core", "llava")
    same(llava.megatron_reads(llava.megatron(config), Layout(), tmp_path / "core"), expected)


def test_heads_that_do_not_divide_are_padded_with_zeros(tmp_path):
    """InternViT's three heads on two ranks, as Megatron has its 25 on eight."""
    whole = llava.tower("internvit", heads=3)
    padded = llava.tower("internvit", heads=3, stored_heads=4)
    two = Layout(tp=2)
    llava.megatron_writes(whole, Layout(), tmp_path / "one", format="torch", images=None)
    llava.megatron_writes(padded, two, tmp_path / "theirs", format="torch", images=None)
    facts = convert(tmp_path / "one", tmp_path / "two", "llava", ckpt_format="torch", **sizes(two))
    assert "heads of zeros were added, 1 of them" in " ".join(facts.notes)
    ours, theirs, one = (held(tmp_path / name) for name in ("two", "theirs", "one"))
    known = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    assert {name: one.shape for name, one in ours.items() if one is not None} == {
        name: tensor.shape for name, tensor in known.items() if tensor is not None
    }
    prefix = "vision_model.decoder.layers.0.self_attention."
    for name, axis, each in (
        ("linear_qkv.weight", 0, 384),
        ("q_layernorm.weight", 0, 128),
        ("linear_proj.weight", 1, 128),
    ):
        joined = torch.cat(
            [ours[rank, prefix + name] for rank in ("mp_rank_00", "mp_rank_01")], axis
        )
        assert torch.equal(joined.narrow(axis, 0, 3 * each), one["mp_rank_00", prefix + name])
        assert not joined.narrow(axis, 3 * each, each).any()
    # Back again, and Megatron's own with heads of anything: they are cut and named.
    facts = convert(
        tmp_path / "two", tmp_path / "back", "llava", ckpt_format="torch", **sizes(Layout())
    )
    assert {drop["reason"] for drop in facts.dropped} >= {"dummy heads, which Megatron zeroes"}
    back = held(tmp_path / "back")
    assert back.keys() == one.keys()
    assert all(t is None or torch.equal(back[name], t) for name, t in one.items())


def converters_names(tower, state):
    """What Megatron's saver hf_llava makes of the state dict of one rank, in eager torch.

    NVIDIA/Megatron-LM tools/checkpoint/{saver_hf_llava,schema_hf}.py @ core_v0.16.1.
    """
    vision = {
        n.removeprefix("vision_model."): t for n, t in state.items() if n.startswith("vision_")
    }
    heads = 2

    def apart(fused):
        parts = fused.reshape(heads, 3, -1, *fused.shape[1:])
        return [parts[:, number].reshape(-1, *fused.shape[1:]) for number in range(3)]

    found = {}
    root = "vision_model.radio_model." if tower == "radio" else "vision_model.vision_model."
    outer = {
        "internvit": {
            "conv1.weight": "embeddings.patch_embedding.weight",
            "conv1.bias": "embeddings.patch_embedding.bias",
            "position_embeddings.weight": "embeddings.position_embedding",
            "class_token": "embeddings.class_embedding",
        },
        "siglip": {
            "conv1.weight": "embeddings.patch_embedding.weight",
            "conv1.bias": "embeddings.patch_embedding.bias",
            "position_embeddings.weight": "embeddings.position_embedding.weight",
            "ln_post.weight": "post_layernorm.weight",
            "ln_post.bias": "post_layernorm.bias",
        },
        "radio": {
            "embedder.weight": "model.patch_generator.embedder.weight",
            "class_token": "model.patch_generator.cls_token.token",
            "position_embeddings": "model.patch_generator.pos_embed",
        },
    }[tower]
    for ours, theirs in outer.items():
        found[root + theirs] = vision[ours]
    norms = ("layer_norm1", "layer_norm2") if tower == "siglip" else ("norm1", "norm2")
    for layer in range(2):
        here = f"decoder.layers.{layer}."
        there = root + (
            f"model.blocks.{layer}." if tower == "radio" else f"encoder.layers.{layer}."
        )
        fused = tower != "internvit"
        places = (
            ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
            if fused
            else ("input_layernorm.", "pre_mlp_layernorm.")
        )
        for kind in ("weight", "bias"):
            for norm, place in zip(norms, places, strict=True):
                if here + place + kind in vision:
                    found[f"{there}{norm}.{kind}"] = vision[here + place + kind]
            for number in (1, 2):
                found[f"{there}mlp.fc{number}.{kind}"] = vision[
                    f"{here}mlp.linear_fc{number}.{kind}"
                ]
            out = "self_attn.out_proj" if tower == "siglip" else "attn.proj"
            found[f"{there}{out}.{kind}"] = vision[f"{here}self_attention.linear_proj.{kind}"]
            qkv = vision.get(f"{here}self_attention.linear_qkv.{kind}")
            if qkv is None:
                continue
            if tower == "siglip":
                for part, one in zip("qkv", apart(qkv), strict=True):
                    found[f"{there}self_attn.{part}_proj.{kind}"] = one
            else:
                found[f"{there}attn.qkv.{kind}"] = torch.cat(apart(qkv))
        if tower == "internvit":
            for part in "qk":
                name = f"{here}self_attention.{part}_layernorm.weight"
                found[f"{there}attn.{part}_norm.weight"] = vision[name]
            for scale in ("ls1", "ls2"):
                found[there + scale] = vision[here + scale]
    if tower == "radio":
        for name, values in (
            ("norm_mean", [0.48145466, 0.4578275, 0.40821073]),
            ("norm_std", [0.26862954, 0.26130258, 0.27577711]),
        ):
            found[f"{root}input_conditioner.{name}"] = torch.tensor(values).reshape(3, 1, 1)
    projection = "vision_projection.encoder.linear_fc"
    for kind in ("weight", "bias"):
        found[f"mlp1.0.{kind}"] = state[f"{projection}1.layer_norm_{kind}"]
        found[f"mlp1.1.{kind}"] = state[f"{projection}1.{kind}"]
        found[f"mlp1.3.{kind}"] = state[f"{projection}2.{kind}"]
    return found | language_names(state)


def language_names(state):
    """The language model's part of the same: four query groups of two heads with eight channels."""
    here, there = "language_model.decoder.", "language_model.model."
    found = {
        f"{there}embed_tokens.weight": state["language_model.embedding.word_embeddings.weight"],
        f"{there}norm.weight": state[f"{here}final_layernorm.weight"],
        "language_model.lm_head.weight": state["language_model.output_layer.weight"],
    }
    for layer in range(4):
        old, new = f"{here}layers.{layer}.", f"{there}layers.{layer}."
        groups = state[f"{old}self_attention.linear_qkv.weight"].reshape(4, 4, 8, 64)
        gate, up = state[f"{old}mlp.linear_fc1.weight"].chunk(2)
        found |= {
            f"{new}self_attn.q_proj.weight": groups[:, :2].reshape(64, 64),
            f"{new}self_attn.k_proj.weight": groups[:, 2].reshape(32, 64),
            f"{new}self_attn.v_proj.weight": groups[:, 3].reshape(32, 64),
            f"{new}self_attn.o_proj.weight": state[f"{old}self_attention.linear_proj.weight"],
            f"{new}input_layernorm.weight": state[
                f"{old}self_attention.linear_qkv.layer_norm_weight"
            ],
            f"{new}post_attention_layernorm.weight": state[
                f"{old}mlp.linear_fc1.layer_norm_weight"
            ],
            f"{new}mlp.gate_proj.weight": gate,
            f"{new}mlp.up_proj.weight": up,
            f"{new}mlp.down_proj.weight": state[f"{old}mlp.linear_fc2.weight"],
        }
    return found


@pytest.mark.parametrize("tower", ["internvit", "siglip", "radio"])
def test_names_of_megatrons_converter(tower, source_of, tmp_path):
    model = llava.tower(tower, projection_norm=True)
    llava.megatron_writes(model, Layout(), tmp_path / "one", format="torch", images=None)
    state = {name: tensor for (_, name), tensor in held(tmp_path / "one").items()}
    vocabulary = {
        name: tensor[:131] if "embed_tokens" in name or "lm_head" in name else tensor
        for name, tensor in converters_names(tower, state).items()
    }
    convert(tmp_path / "one", tmp_path / "hf", "hf_llava")
    found = hf.weights(tmp_path / "hf")
    assert sorted(found) == sorted(vocabulary)
    for name, tensor in vocabulary.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    # Megatron's saver writes one pickle and no config: that of the language model says the rest.
    (tmp_path / "bin").mkdir()
    torch.save(
        {n: t.clone() for n, t in vocabulary.items()}, tmp_path / "bin" / "pytorch_model.bin"
    )
    text = tmp_path / "text"
    text.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], **source_of("clip")[1].text_config.to_dict()}
    (text / "config.json").write_text(json.dumps(config))
    for source, base in ((tmp_path / "hf", None), (tmp_path / "bin", text)):
        target = tmp_path / f"from-{source.name}"
        options = {"ckpt_format": "torch", "true_vocab_size": 131}
        convert(source, target, "llava", loader="hf_llava", hf_base=base, **options)
        again = {name: tensor for (_, name), tensor in held(target).items()}
        assert sorted(again) == sorted(state)
        for name, tensor in state.items():
            if tensor is not None and "embedding.word" not in name and "output_layer" not in name:
                assert torch.equal(again[name], tensor), name
