"""verl's Megatron workers: what real megatron-core saves for them, transformers computes alike."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from ckptx.errors import FormatError, SchemaError
from ckptx.registry import registry
from tests.oracles import hf, mcore
from tests.oracles.mcore import Layout

from .conversion import CLOSE, LAYOUTS, TOKENS, convert, difference, strict_logits
from .test_verl import full

FORMS = {"dist_ckpt": "torch_dist", "model": "torch"}


def write(model, layout, actor, form, head=None, weights=True):
    """What Megatron workers save of random weights in a source's shape; Megatron's logits."""
    place = actor / "huggingface"
    place.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model.directory / name, place)
    megatron = hf.mcore_model(model.config, pad_to=4 * layout.tp)
    if head is not None:  # as verl builds critics
        gpt = {**megatron.gpt, "share_embeddings_and_output_weights": False}
        megatron = replace(megatron, gpt=gpt)
    return mcore.write(
        megatron,
        layout,
        actor,
        model.tokens,
        format=FORMS[form],
        verl={"head": head, "weights": weights},
    )


@pytest.mark.parametrize(
    ("family", "layout", "form"),
    [
        ("llama", "tp2-pp2", "dist_ckpt"),
        full("llama", "tp1", "dist_ckpt"),
        ("qwen2-tied", "pp2-vpp2", "dist_ckpt"),
        ("qwen3", "pp2-first1", "model"),
        ("qwen2-tied", "tp2-pp2", "model"),
        full("qwen2-tied", "tp2", "model"),
        full("qwen2", "pp2-vpp2", "model"),
        full("qwen2-tied", "pp3-embedding-loss", "model"),
        full("llama-2groups", "tp4", "model"),
        full("llama-2groups", "tp4", "dist_ckpt"),
    ],
)
def test_the_same_logits(family, layout, form, source_of, tmp_path):
    model = source_of(family)
    actor = tmp_path / "global_step_30" / "actor"
    expected = write(model, LAYOUTS[layout], actor, form)
    assert registry.detect(actor) == "verl"
    facts = convert(tmp_path / "global_step_30", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", model.tokens)
    assert difference(found, expected[..., : model.config.vocab_size]) < CLOSE
    dropped = {drop["name"] for drop in facts.dropped}
    assert not {"dist_ckpt", "model", "transformer_config.json"} & dropped
    assert not (tmp_path / "hf" / "transformer_config.json").exists()
    if form == "dist_ckpt":
        assert "rng_state" in dropped


@pytest.mark.parametrize("form", [pytest.param("dist_ckpt", marks=pytest.mark.full), "model"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3_moe", Layout(ep=2)), full("qwen3_moe", Layout(tp=2, ep=2, etp=2, pp=2))],
)
def test_experts(family, layout, form, source_of, tmp_path):
    model = source_of(family)
    expected = write(model, layout, tmp_path / "actor", form)
    convert(tmp_path / "actor", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", model.tokens)
    assert difference(found, expected[..., : model.config.vocab_size]) < CLOSE


def test_to_core(source_of, tmp_path):
    model = source_of("llama")
    actor = tmp_path / "global_step_30" / "actor"
    expected = write(model, LAYOUTS["tp2"], actor, "dist_ckpt")
    convert(actor, tmp_path / "core", "core", target_tensor_parallel_size=1)
    assert (tmp_path / "core" / "iter_0000030").is_dir()
    found = mcore.read(None, LAYOUTS["tp1"], tmp_path / "core", model.tokens)
    rows = model.config.vocab_size
    assert difference(found[..., :rows], expected[..., :rows]) < CLOSE


def values(directory, tokens):
    """What transformers computes per token, and finds in the files exactly what it looks for."""
    model, loading = AutoModelForTokenClassification.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize(
    ("family", "layout", "form", "bias"),
    [
        ("llama", "tp2-pp2", "dist_ckpt", True),
        ("qwen2-tied", "tp2-pp2", "model", False),
        full("llama", "pp2-vpp2", "model", True),
        full("qwen2", "tp1", "dist_ckpt", False),
    ],
)
def test_value_models(family, layout, form, bias, source_of, tmp_path):
    model = source_of(family)
    step = tmp_path / "global_step_2"
    expected = write(model, LAYOUTS[layout], step / "critic", form, head=bias)
    facts = convert(
        step,
        tmp_path / "hf",
        "hf",
        loader="verl",
        loader_options={"actor_dir": "critic", "is_value_model": True},
    )
    found = values(tmp_path / "hf", model.tokens)
    assert difference(found, expected[..., :1]) < CLOSE
    assert any("a value model" in note for note in facts.notes)
    assert any("score.bias" in note for note in facts.notes) is not bias


def test_a_config_for_whole_sequences_stays(source_of, tmp_path):
    model = source_of("llama")
    actor = tmp_path / "actor"
    expected = write(model, LAYOUTS["tp1"], actor, "dist_ckpt", head=False)
    config = actor / "huggingface" / "config.json"
    changed = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 130}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    convert(actor, tmp_path / "hf", "hf")
    reward, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf",
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    tokens = model.tokens.clamp(max=129)
    with torch.no_grad():
        hidden = reward.model(model.tokens).last_hidden_state
        found = reward.score(hidden)
        assert reward(tokens).logits.shape == (2, 1)
    assert difference(found, expected) < CLOSE


def test_the_output_layer_is_left_out_if_asked(source_of, tmp_path):
    model = source_of("llama")
    write(model, LAYOUTS["tp2"], tmp_path / "actor", "dist_ckpt")
    facts = convert(
        tmp_path / "actor", tmp_path / "hf", "hf", loader_options={"tie_word_embedding": True}
    )
    (left,) = (drop for drop in facts.dropped if drop["name"] == "output_layer.weight")
    assert left["reason"] == "left out: --tie-word-embedding"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    strict_logits(tmp_path / "hf", TOKENS)


@pytest.fixture(scope="module")
def saved(source_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("verl-megatron")
    model = source_of("qwen2-tied")
    for form in FORMS:
        write(model, LAYOUTS["tp2-pp2"], root / form, form)
    return root


def refused(actor, tmp_path, **options):
    with pytest.raises((FormatError, SchemaError)) as caught:
        convert(actor, tmp_path / "refused", "hf", loader="verl", **options)
    assert not (tmp_path / "refused").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(saved, tmp_path, form):
    return shutil.copytree(saved / form, tmp_path / "actor")


def test_no_value_head(saved, tmp_path):
    message = refused(saved / "model", tmp_path, loader_options={"is_value_model": True})
    assert "there is no output_layer.weight with one row" in message


def test_no_config(saved, tmp_path):
    actor = copied(saved, tmp_path, "dist_ckpt")
    shutil.move(actor / "huggingface", tmp_path / "elsewhere")
    assert "give --hf-base with the config" in refused(actor, tmp_path)
    convert(actor, tmp_path / "hf", "hf", hf_base=tmp_path / "elsewhere")


def test_a_save_that_was_not_finished(saved, tmp_path):
    actor = copied(saved, tmp_path, "dist_ckpt")
    (actor / "dist_ckpt" / "metadata.json").unlink()
    assert "the save was not finished; use an earlier step" in refused(actor, tmp_path)


def test_missing_and_foreign_ranks(saved, tmp_path):
    actor = copied(saved, tmp_path, "model")
    rank = actor / "model" / "mp_rank_00_001"
    shutil.move(rank, tmp_path / "kept")
    message = refused(actor, tmp_path)
    assert "1 of 4 rank directories are missing: 'mp_rank_00_001'; copy them" in message
    shutil.copytree(tmp_path / "kept", actor / "model" / "mp_rank_for_expert00_001")
    assert "expected mp_rank_TT, mp_rank_TT_PPP" in refused(actor, tmp_path)


def test_one_stage_of_several(saved, tmp_path):
    actor = copied(saved, tmp_path, "model")
    for rank in actor.glob("model/mp_rank_*_001"):
        shutil.rmtree(rank)
    assert "of which only the first is there; copy the others" in refused(actor, tmp_path)


def test_fewer_layers_than_the_config_says(saved, tmp_path):
    actor = copied(saved, tmp_path, "model")
    config = actor / "huggingface" / "config.json"
    changed = {**json.loads(config.read_text()), "num_hidden_layers": 9}
    config.write_text(json.dumps({**changed, "layer_types": None}))
    assert "the ranks hold 4 layers, the config says 9" in refused(actor, tmp_path)


def test_no_state_dicts_in_a_rank(saved, tmp_path):
    actor = copied(saved, tmp_path, "model")
    torch.save(7, actor / "model" / "mp_rank_00_000" / "model.pt")
    assert "expected a list of state dicts, found int" in refused(actor, tmp_path)


def test_weights_that_a_bridge_has_written(source_of, tmp_path):
    model = source_of("llama")
    write(model, LAYOUTS["tp2"], tmp_path / "actor", "dist_ckpt", weights=False)
    message = refused(tmp_path / "actor", tmp_path)
    assert message.endswith("dist_ckpt: holds no weights")
    beside = tmp_path / "actor" / "huggingface"
    shutil.copy(model.directory / "model.safetensors", beside)
    message = refused(tmp_path / "actor", tmp_path)
    assert f"holds no weights; they are in {beside}: convert that directory" in message
    convert(beside, tmp_path / "hf", "hf")


def test_adapters_are_merged_by_the_alpha_that_the_user_knows(saved, tmp_path):
    """test_megatron_lora holds the merge against peft; here B is zero and the base is expected."""
    actor = copied(saved, tmp_path, "model")
    convert(actor, tmp_path / "expected", "hf")
    for path in actor.glob("model/*/model.pt"):
        stages = torch.load(path, weights_only=False)
        module = "self_attention.linear_proj."
        for name, tensor in dict(stages[0]).items():
            if module in name and name.endswith("weight"):
                stem = name.replace("weight", "adapter.linear_")
                stages[0][f"{stem}in.weight"] = torch.ones(2, tensor.shape[1])
                stages[0][f"{stem}out.weight"] = torch.zeros(tensor.shape[0], 2)
        torch.save(stages, path)
    assert "lora_alpha is None" in refused(actor, tmp_path)
    convert(actor, tmp_path / "hf", "hf", loader_options={"lora_alpha": 4})
    expected = hf.weights(tmp_path / "expected")
    for key, tensor in hf.weights(tmp_path / "hf").items():
        assert torch.equal(tensor, expected[key]), key
