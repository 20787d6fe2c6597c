"""Multi-latent attention: transformers and Megatron Core on either side compute the same logits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from ckptx.errors import CkptxError, SchemaError
from ckptx.schemas.conventions.mcore import MCORE
from ckptx.schemas.megatron_settings.args import spec_from_args
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, contents, convert, difference
from .conversion import Source as SourceModel
from .experts import KINDS, LATENT, expert_sizes, to_megatron, to_transformers
from .experts import LAYOUTS as ALL_LAYOUTS

FORMATS = ("torch_dist", "torch")
ENGINE = [name for name in KINDS if name.startswith("te")]
LAYOUTS = {**ALL_LAYOUTS, "tp2-pp2-layout": Layout(tp=2, pp=2, ep=2, etp=1, layout="Ett|ttL")}
NAMES = list(LATENT)


def combinations(shift):
    """Every family at every layout; every third in everyday's runs, one form and kind in turn."""
    found = []
    for number, (layout, family) in enumerate(itertools.product(LAYOUTS, LATENT)):
        turn = number + shift
        case = family, layout, FORMATS[turn // 2 % 2], ENGINE[(turn + turn // 4) % 2]
        found.append(pytest.param(*case, marks=[pytest.mark.full] * bool(turn % 7)))
    return found


@pytest.mark.parametrize(("family", "layout", "format", "kind"), combinations(0))
def test_megatron_computes_what_transformers_computes(
    family, layout, format, kind, source_of, tmp_path
):
    case = source_of(family), LAYOUTS[layout], format, KINDS[kind]
    assert to_megatron(*case, tmp_path) <= CLOSE


@pytest.mark.parametrize(("family", "layout", "format", "kind"), combinations(3))
def test_transformers_computes_what_megatron_computes(
    family, layout, format, kind, source_of, tmp_path
):
    case = source_of(family), LAYOUTS[layout], format, KINDS[kind]
    assert to_transformers(*case, tmp_path) <= CLOSE


@pytest.mark.parametrize("family", NAMES)
def test_every_model_comes_back_as_it_was(family, source_of, tmp_path):
    before = source_of(family).directory
    one, two = (expert_sizes(LAYOUTS[name]) for name in ("tp2-ep2-etp1", "pp2-vpp2-ep2"))
    convert(before, tmp_path / "one", "core", ckpt_format="torch", **one, moe_grouped_gemm=True)
    convert(tmp_path / "one", tmp_path / "two", "core", ckpt_format="torch_dist", **two)
    convert(tmp_path / "two", tmp_path / "after", "hf")
    assert contents(tmp_path / "after") == contents(before)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A DeepSeek-V3 with a layer for multi-token prediction, as it was published."""
    directory = tmp_path_factory.mktemp("published")
    config = hf.deepseek_v3(directory)
    hf.add_further_layer(directory, config)
    return SourceModel("published", directory, hf.config(directory))


def saved(tensors, source, tmp_path):
    """Write tensors beside the config of a model, and return their directory."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    return directory


def configured(source, tmp_path, **changes):
    """Return a directory with the weights of a model and a config that says something else."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(source.directory / "model.safetensors")
    said = json.loads((source.directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | changes, indent=2))
    return directory


def both_logits(source):
    return torch.cat([source.logits, hf.further_logits(source.directory, source.tokens)], 1)


def predicting(kind, source, layout):
    model = KINDS[kind].model(source, layout)
    return replace(model, config={**model.config, "mtp_num_layers": 1})


FURTHER = {
    "tp1": Layout(),
    "tp2-pp2-ep2-etp1": ALL_LAYOUTS["tp2-pp2-ep2-etp1"],
    "pp2-vpp2-ep2": ALL_LAYOUTS["pp2-vpp2-ep2"],
    "tp2-pp2-layout": Layout(tp=2, pp=2, layout="Ettt|tmL"),
}


@pytest.mark.parametrize(
    ("layout", "format"),
    [
        pytest.param(*case, marks=[] if number % 3 == 1 else [pytest.mark.full])
        for number, case in enumerate(itertools.product(FURTHER, FORMATS))
    ],
)
def test_multi_token_prediction_both_ways(layout, format, published, tmp_path):
    layout, expected = FURTHER[layout], both_logits(published)
    sizes = {"ckpt_format": format, "moe_grouped_gemm": True, **expert_sizes(layout)}
    facts = convert(published.directory, tmp_path / "core", "core", **sizes)
    assert facts.replicas  # the copies of embedding and output layer
    model = predicting("te-grouped", published, layout)
    found = mcore.read(model, layout, tmp_path / "core", published.tokens, format=format)
    assert difference(found[..., :131], expected) <= CLOSE
    # Megatron's own checkpoint, without a config at hand.
    arguments = {"format": format, "args": {"vocab_size": 131}}
    theirs = tmp_path / "theirs"
    expected = mcore.write(model, layout, theirs, published.tokens, **arguments)
    convert(theirs, tmp_path / "hf", "hf")
    back = SourceModel("back", tmp_path / "hf", hf.config(tmp_path / "hf"))
    assert difference(both_logits(back), expected[..., :131]) <= CLOSE
    assert back.config.num_nextn_predict_layers == 1
    assert sorted(hf.weights(back.directory)) == sorted(hf.weights(published.directory))


def test_published_files_come_back_as_they_were(published, tmp_path):
    sizes = expert_sizes(FURTHER["pp2-vpp2-ep2"])
    convert(published.directory, tmp_path / "core", "core", ckpt_format="torch", **sizes)
    convert(tmp_path / "core", tmp_path / "after", "hf")
    assert contents(tmp_path / "after") == contents(published.directory)


def test_weights_without_the_layers_that_the_config_says(source_of, tmp_path):
    """Transformers saves the config with them and the weights without."""
    source = source_of("deepseek_v3")
    directory = configured(source, tmp_path, num_nextn_predict_layers=1)
    facts = convert(directory, tmp_path / "core", "core")
    assert any("the weights hold none" in note for note in facts.notes)
    found = mcore.read(None, Layout(), tmp_path / "core", source.tokens)
    assert difference(found[..., :131], source.logits) <= CLOSE


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_is_an_error(name, published, tmp_path):
    tensors = load_file(published.directory / "model.safetensors")
    tensors[f"model.layers.4.{name}"][3, 5] += 1
    with pytest.raises(CkptxError, match="copy 1 of 2 differs"):
        convert(saved(tensors, published, tmp_path), tmp_path / "core", "core")
    assert not (tmp_path / "core").exists()


def test_part_of_a_layer_for_prediction_is_an_error(published, tmp_path):
    tensors = load_file(published.directory / "model.safetensors")
    del tensors["model.layers.4.eh_proj.weight"]
    with pytest.raises(SchemaError, match=r"missing: .*layers\.4\.eh_proj\.weight"):
        convert(saved(tensors, published, tmp_path), tmp_path / "core", "core")


@pytest.mark.parametrize(
    "family", ["deepseek_v3", pytest.param("moonlight", marks=pytest.mark.full)]
)
def test_projections_that_ranks_cut_are_told_by_their_shape(family, source_of, tmp_path):
    """The spec without Transformer Engine cuts them, and has the norms as modules."""
    source, layout = source_of(family), LAYOUTS["tp2-ep2-etp1"]
    options = {"ckpt_format": "torch", **expert_sizes(layout)}
    convert(source.directory, tmp_path / "core", "core", **options)
    for rank, file in enumerate(sorted((tmp_path / "core").rglob("*.pt"))):
        state = torch.load(file, weights_only=False)
        local = {}
        for name, tensor in state["model"].items():
            for part in ("q", "kv"):
                fused = f"linear_{part}_up_proj.layer_norm_weight"
                name = name.replace(fused, f"{part}_layernorm.weight")
            cut = "_down_proj.weight" in name
            local[name] = tensor.chunk(2)[rank].clone() if cut else tensor
        state["model"] = local
        torch.save(state, file)
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(source.directory)


@pytest.mark.parametrize("kind", ENGINE)
def test_rules_stand_in_the_order_of_megatrons_parameters(kind, published, source_of, tmp_path):
    for name, source in (("mtp", published), ("direct", source_of("moonlight"))):
        model = (
            predicting(kind, source, Layout())
            if name == "mtp"
            else KINDS[kind].model(source, Layout())
        )
        mcore.write(model, Layout(), tmp_path / name, source.tokens, format="torch")
        (file,) = (tmp_path / name).rglob("*.pt")
        state = torch.load(file, weights_only=False)
        theirs = [name for name in state["model"] if not name.endswith("_extra_state")]
        assert MCORE[f"mcore-{kind}"].names(spec_from_args(vars(state["args"]))) == theirs


def test_our_ranks_hold_what_megatrons_hold(published, tmp_path):
    """Megatron writes the same model at two layouts; cutting the first anew gives the second."""
    layout = FURTHER["tp2-pp2-ep2-etp1"]
    model = predicting("te", published, layout)
    for name, where in (("whole", Layout()), ("theirs", layout)):
        mcore.write(model, where, tmp_path / name, published.tokens, format="torch")
    options = {"ckpt_format": "torch", **expert_sizes(layout)}
    convert(tmp_path / "whole", tmp_path / "ours", "core", **options)
    for file in sorted((tmp_path / "theirs").rglob("*.pt")):
        here = tmp_path / "ours" / file.relative_to(tmp_path / "theirs")
        theirs, ours = (torch.load(f, weights_only=False)["model"] for f in (file, here))
        assert sorted(ours) == sorted(theirs)
        for name, tensor in theirs.items():
            same = ours[name] is None if tensor is None else torch.equal(ours[name], tensor)
            assert same, name


def test_torch_dist_has_megatrons_keys(published, tmp_path):
    layout = Layout(tp=2, ep=2)
    mcore.write(predicting("te", published, layout), layout, tmp_path / "theirs", published.tokens)
    convert(published.directory, tmp_path / "ours", "core", **expert_sizes(layout))
    theirs, ours = (
        FileSystemReader(tmp_path / path).read_metadata().state_dict_metadata
        for path in ("theirs/iter_0000010", "ours/release")
    )
    states = {name for name in ours if "_extra_state" in name}
    assert set(ours) - (states - set(theirs)) == set(theirs)
    assert {n: e.size for n, e in theirs.items() if hasattr(e, "size")} == {
        n: e.size for n, e in ours.items() if hasattr(e, "size")
    }


@pytest.mark.parametrize("format", FORMATS)
def test_biases_of_experts_are_float32_in_megatron(format, source_of, tmp_path):
    """Its module makes them so, whatever the dtype of the model."""
    source = source_of("deepseek_v3")
    tensors = {n: t.bfloat16() for n, t in hf.weights(source.directory).items()}
    convert(saved(tensors, source, tmp_path), tmp_path / "core", "core", ckpt_format=format)
    convert(tmp_path / "core", tmp_path / "ranks", "core", ckpt_format="torch")
    (file,) = (tmp_path / "ranks").rglob("*.pt")
    state = torch.load(file, weights_only=False)["model"]
    biases = {n: t for n, t in state.items() if n.endswith("expert_bias")}
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert {t.dtype for t in biases.values()} == {torch.float32}
    assert torch.equal(biases["decoder.layers.3.mlp.router.expert_bias"], tensors[name].float())


def test_kimi_is_deepseek_under_a_name_of_its_own(source_of, tmp_path):
    source = source_of("moonlight")
    kimi = configured(source, tmp_path, model_type="kimi_k2")
    convert(kimi, tmp_path / "core", "core", **expert_sizes(LAYOUTS["pp2-ep2"]))
    convert(tmp_path / "core", tmp_path / "after", "hf")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["model_type"] == "kimi_k2"
    before, after = (hf.weights(directory) for directory in (kimi, tmp_path / "after"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_groups_that_megatron_ranks_otherwise_are_named(tmp_path):
    """The published V2 chooses 6 experts in 3 of 8 groups: a group's best, or its best two."""
    sizes = {
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
    }
    hf.deepseek_v2(tmp_path / "model", **sizes)
    facts = convert(tmp_path / "model", tmp_path / "core", "core")
    assert any("some tokens go to other experts" in note for note in facts.notes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "rotates neighbouring channels"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v3", {"kv_lora_rank": 32}, "the config does not belong to these weights"),
    ],
)
def test_configs_that_megatron_cannot_follow(family, changes, message, source_of, tmp_path):
    directory = configured(source_of(family), tmp_path, **changes)
    with pytest.raises(SchemaError, match=message):
        convert(directory, tmp_path / "core", "core")
    assert not (tmp_path / "core").exists()


def test_the_local_spec_is_refused(source_of, tmp_path):
    with pytest.raises(SchemaError, match="write Transformer Engine's names"):
        convert(
            source_of("deepseek_v3").directory,
            tmp_path / "core",
            "core",
            saver_transformer_impl="local",
        )
