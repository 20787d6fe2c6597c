"""Legacy Megatron checkpoints of every age through the kit, and against ones made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ckptx.errors import CkptxError, FormatError, PlanError, SchemaError
from ckptx.registry import registry
from ckptx.testing.contracts import (
    Checkpoint,
    LoaderTests,
    SaverTests,
    assert_equal,
    assert_one_line,
    assert_same_files,
    unpadded,
)
from ckptx.testing.conversion import begin_of, convert, end_of, loaded, save
from ckptx.testing.models import MODELS, messages, tiny, write_hf
from tests.oracles import legacy as oracle

from .by_hand import assert_state, even, padded, write_distributed, write_ranks
from .legacy_by_hand import legacy_args, rank_states, write

LOADER, SAVER = registry.loader("legacy"), registry.saver("legacy")
CORE, CORE_SAVER = registry.loader("core"), registry.saver("core")
HF_LOADER, HF_SAVER = registry.loader("hf"), registry.saver("hf")
GPT = tiny("gpt", "gpt-heads", num_query_groups=8)
GPT_TIED = tiny("gpt", "gpt-tied", tied=True, num_query_groups=8, activation="gelu_tanh")
BY_NAME = {model.name: model for model in (*MODELS, GPT, GPT_TIED)}
LLAMA, TIED, SQUARE = BY_NAME["llama"], BY_NAME["qwen2-tied"], BY_NAME["square"]
MIXTURE = tiny(
    "gpt",
    "gpt-switch",
    num_query_groups=8,
    activation="swiglu",
    normalization="RMSNorm",
    add_bias_linear=False,
    num_experts=4,
    moe_ffn_hidden_size=40,
    moe_router_topk=1,
    moe_router_score_function="sigmoid",
)
HELD = tuple(model for model in MODELS if model.spec.family != "qwen3")
NORMED = BY_NAME["qwen3"]


def options(tp=1, pp=1, vpp=None, **more):
    said = {
        "target_tensor_parallel_size": tp,
        "target_pipeline_parallel_size": pp,
        "target_virtual_pipeline_parallel_size": vpp,
        **more,
    }
    return {name: value for name, value in said.items() if value is not None}


def _with_padding(model, rows):
    found = model.canonical(padded=False)
    for message, key in (("embeddings", "word embeddings"), ("output layer", "weight")):
        if message in found:
            found[message] = {**found[message], key: padded(found[message][key], rows)}
    return found


class TestVersion3(LoaderTests, SaverTests):
    """What Megatron writes since it has query groups, and what the saver writes."""

    loader, saver = LOADER, SAVER
    models = (LLAMA, TIED, MODELS[2], GPT, GPT_TIED)

    def write(self, directory: Path, model) -> Checkpoint:
        root = write(directory, model, 2, even(4, 2), rows=40)
        return Checkpoint(root, _with_padding(model, 40))

    def cases(self):
        return [
            (LLAMA, options()),
            (LLAMA, options(tp=2, pp=4)),
            (SQUARE, options(tp=4, pp=2)),
            (BY_NAME["llama-biases"], options(tp=2, pp=2)),
            (BY_NAME["llama-odd-heads"], options(tp=3)),
            (BY_NAME["llama-twelve-layers"], options(tp=2, pp=3, vpp=2)),
            (BY_NAME["mistral-one-group"], options(pp=2, iteration="7")),
            (TIED, options(tp=8, pp=4)),
            (TIED, options(tp=2, pp=2, vpp=2, make_vocab_size_divisible_by=1)),
            (GPT, options(tp=2, pp=2)),
            (GPT_TIED, options(tp=4, pp=2, vpp=2)),
            (MIXTURE, options(tp=2, pp=2, target_expert_parallel_size=2)),
        ]


class TestVersion1Old(LoaderTests):
    """[heads, size, 3], and the names of before there were norms of other kinds."""

    loader = LOADER
    models = (SQUARE, TIED, GPT, GPT_TIED)

    def write(self, directory: Path, model) -> Checkpoint:
        tp, stages = 2, even(model.spec.num_layers, 2)
        root = write(directory, model, tp, stages, rows=40, version=1, spelling="old")
        return Checkpoint(root, _with_padding(model, 40))


class TestVersion0Oldest(LoaderTests):
    """[3, heads, size], a file that does not even say so, and a flat language model."""

    loader = LOADER
    models = (SQUARE, TIED, GPT, GPT_TIED)

    def write(self, directory: Path, model) -> Checkpoint:
        stages = even(model.spec.num_layers, 1)
        root = write(directory, model, 4, stages, rows=48, version=None, spelling="oldest")
        return Checkpoint(root, _with_padding(model, 48))


@pytest.mark.parametrize("spelling", oracle.SPELLINGS)
@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3])
@pytest.mark.parametrize("model", [TIED, GPT], ids=str)
def test_every_version_in_every_spelling(model, version, spelling, tmp_path):
    root = write(tmp_path, model, 2, even(4, 2, 2), rows=40, version=version, spelling=spelling)
    assert_equal(loaded(LOADER, root), _with_padding(model, 40))


@pytest.mark.parametrize(
    ("name", "tp", "stages"),
    [
        ("llama", 1, even(4, 1)),
        ("llama", 2, even(4, 2)),
        ("llama-biases", 2, even(4, 2, 2)),
        ("llama-twelve-layers", 2, even(12, 3, 2)),
        ("qwen2-tied", 2, even(4, 2)),
        ("qwen2-tied", 4, even(4, 1)),
        ("gpt-heads", 2, even(4, 2)),
        ("gpt-tied", 2, even(4, 2, 2)),
    ],
)
def test_ranks_hold_what_numpy_cuts(name, tp, stages, tmp_path):
    model, vpp = BY_NAME[name], len(stages[0])
    chosen = options(tp, len(stages), vpp if vpp > 1 else None, make_vocab_size_divisible_by=10)
    root = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", chosen)
    rows = -(-model.vocabulary // (10 * tp)) * 10 * tp
    expected = rank_states(model, tp, stages, rows)
    assert sorted(p.name for p in (root / "release").glob("mp_rank_*")) == sorted(expected)
    for directory, models in expected.items():
        path = root / "release" / directory / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        assert state["checkpoint_version"] == 3.0
        assert state["args"].use_legacy_models is True
        assert sorted(key for key in state if key.startswith("model")) == sorted(models)
        for key, arrays in models.items():
            assert_state(oracle.flat(state[key]), arrays)


def test_the_tree_is_the_one_that_megatron_looks_for(tmp_path):
    """Its keys are those of ``state_dict_for_save_checkpoint``, dotted below the encoder."""
    root = save(SAVER, messages(GPT_TIED, tmp_path / "s"), tmp_path / "t", options(pp=2))
    first, last = (
        torch.load(
            root / "release" / f"mp_rank_00_{n:03d}" / "model_optim_rng.pt", weights_only=False
        )["model"]
        for n in range(2)
    )
    assert set(first) == {"language_model"}
    assert set(first["language_model"]) == {"embedding", "encoder"}
    tables = {"word_embeddings", "position_embeddings"}
    assert set(first["language_model"]["embedding"]) == tables
    assert set(first["language_model"]["embedding"]["word_embeddings"]) == {"weight"}
    assert set(last) == {"language_model", "word_embeddings_for_head"}
    assert "layers.1.mlp.dense_4h_to_h.bias" in last["language_model"]["encoder"]
    assert "final_norm.weight" in last["language_model"]["encoder"]


def test_files_load_with_weights_only(tmp_path):
    root = save(SAVER, messages(LLAMA, tmp_path / "s"), tmp_path / "t", {})
    with torch.serialization.safe_globals([type(legacy_args(LLAMA, 1, even(4, 1), 40))]):
        torch.load(root / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)


@pytest.mark.parametrize("model", HELD, ids=str)
def test_hf_to_legacy_to_hf_is_the_same_file(model, tmp_path):
    source = write_hf(tmp_path / "source", model)
    plain = convert(HF_LOADER, source, HF_SAVER, tmp_path / "plain" / "model")
    tp = 3 if model.name == "llama-odd-heads" else min(2, model.spec.num_query_groups)
    old = convert(HF_LOADER, source, SAVER, tmp_path / "legacy", options(tp, 2))
    back = convert(LOADER, old, HF_SAVER, tmp_path / "back" / "model")
    assert_same_files(plain, back)


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("model", [LLAMA, TIED, GPT, GPT_TIED, MIXTURE], ids=str)
def test_legacy_to_core_and_back(model, ckpt_format, tmp_path):
    old = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "old", options(2, 2))
    core = convert(LOADER, old, CORE_SAVER, tmp_path / "core", {"ckpt_format": ckpt_format})
    assert_equal(unpadded(loaded(CORE, core), model), model.canonical())
    again = convert(CORE, core, SAVER, tmp_path / "again" / "old")
    assert_equal(loaded(LOADER, again), loaded(LOADER, old))
    args = begin_of(CORE.load(core, {})).training["args"]
    assert not args["use_legacy_models"], "Megatron would build a legacy model of it"
    assert begin_of(LOADER.load(again, {})).parts == begin_of(LOADER.load(old, {})).parts


def test_a_resharded_old_checkpoint_is_one_of_today(tmp_path):
    root = write(tmp_path / "s", TIED, 2, even(4, 2), rows=40, version=0, spelling="old")
    new = convert(LOADER, root, SAVER, tmp_path / "new", options(4, 1))
    assert_equal(unpadded(loaded(LOADER, new), TIED), TIED.canonical())
    state = torch.load(new / "iter_0000010/mp_rank_03/model_optim_rng.pt", weights_only=False)
    assert state["checkpoint_version"] == 3.0
    assert "encoder" in state["model"]["language_model"]


def test_args_from_before_there_were_other_sizes(tmp_path):
    """Megatron had one name less for each of these once."""
    model = tiny("gpt", "gpt-ancient", num_query_groups=8, ffn_hidden_size=64, kv_channels=2)
    model = replace(model, spec=replace(model.spec, activation="gelu_tanh", tied=True))
    args = legacy_args(model, 2, even(4, 1), 40)
    known = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    kept = {name: getattr(args, name) for name in known}
    old = type(args)(**kept, layernorm_epsilon=1e-5, model_parallel_size=2, fp16=False)
    root = write(tmp_path, model, 2, even(4, 1), 40, version=None, spelling="oldest", args=old)
    assert_equal(loaded(LOADER, root), _with_padding(model, 40))
    spec = begin_of(LOADER.load(root, {})).parts["language"]
    assert (spec.ffn_hidden_size, spec.kv_channels, spec.norm_epsilon) == (64, 2, 1e-5)
    assert (spec.normalization, spec.activation) == ("LayerNorm", "gelu_tanh")


def test_openai_gelu_is_the_tanh_form(tmp_path):
    model = tiny("gpt", num_query_groups=8)
    args = legacy_args(model, 1, even(4, 1), 40)
    args.openai_gelu, args.bias_gelu_fusion = True, False
    root = write(tmp_path / "s", model, 1, even(4, 1), 40, args=args)
    assert begin_of(LOADER.load(root, {})).parts["language"].activation == "gelu_tanh"
    core = convert(LOADER, root, CORE_SAVER, tmp_path / "t", {"ckpt_format": "torch"})
    args = begin_of(CORE.load(core, {})).training["args"]
    assert args["bias_gelu_fusion"] is True


def test_a_stage_of_its_own_for_the_embedding(tmp_path):
    stages = [[[]], [[0, 1]], [[2, 3]]]
    args = legacy_args(LLAMA, 2, stages, 40)
    args.standalone_embedding_stage = True
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    root = write(tmp_path, LLAMA, 2, stages, 40, args=args)
    assert_equal(loaded(LOADER, root), _with_padding(LLAMA, 40))


def test_without_args_a_config_says_the_sizes(tmp_path):
    config = write_hf(tmp_path / "config", TIED)
    root = tmp_path / "s"
    write(root, TIED, 2, even(4, 2), 40, version=0)
    for path in root.glob("iter_0000010/mp_rank_*/model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        del state["args"]
        torch.save(state, path)
    (root / "iter_0000010" / "huggingface" / "config.json").unlink()
    with pytest.raises(SchemaError, match="give --hf-base") as error:
        list(LOADER.load(root, {}))
    assert_one_line(error.value)
    assert_equal(loaded(LOADER, root, {"hf_base": config}), _with_padding(TIED, 40))


def test_who_reads_what(tmp_path):
    old = write(tmp_path / "old", LLAMA, 2, even(4, 2), 40)
    core = write_ranks(tmp_path / "core", LLAMA, 2, even(4, 2), 40)
    stacked = write_distributed(tmp_path / "stacked", LLAMA, 40)
    assert [registry.detect(root) for root in (old, core, stacked)] == ["legacy", "core", "core"]
    for loader, root, name in (
        (CORE, old, "legacy"),
        (LOADER, core, "core"),
        (LOADER, stacked, "core"),
    ):
        with pytest.raises(FormatError, match=rf"use --loader {name} \(--from {name}\)") as error:
            list(loader.load(root, {}))
        assert_one_line(error.value)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (0, "checkpoint_version 0 has as many keys as queries"),
        (7, "checkpoint_version is 7, known"),
    ],
)
def test_versions_that_cannot_be(version, said, tmp_path):
    root = write(tmp_path, LLAMA, 2, even(4, 2), 40)
    _change(root, checkpoint_version=version)
    with pytest.raises(SchemaError, match=said) as error:
        list(LOADER.load(root, {}))
    assert "mp_rank_00_000" in str(error.value)
    assert_one_line(error.value)


def _change(root, rank="*", **values):
    for path in root.glob(f"iter_0000010/mp_rank_{rank}/model_optim_rng.pt"):
        torch.save(torch.load(path, weights_only=False) | values, path)


def test_ranks_of_two_versions_are_two_runs(tmp_path):
    root = write(tmp_path, TIED, 2, even(4, 2), 40)
    _change(root, "01_001", checkpoint_version=0)
    with pytest.raises(
        FormatError, match="checkpoint_version is 0, in mp_rank_00_000 it is 3"
    ) as e:
        list(LOADER.load(root, {}))
    assert "mp_rank_01_001" in str(e.value)
    assert_one_line(e.value)


def test_a_missing_rank_is_named(tmp_path):
    root = write(tmp_path, TIED, 2, even(4, 2), 40)
    place = root / "iter_0000010"
    (place / "mp_rank_01_000").rename(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"1 of 4 rank directories are missing: .?mp_rank_01_000"):
        list(LOADER.load(root, {}))


def test_one_tensor_in_two_spellings(tmp_path):
    root = write(tmp_path, TIED, 1, even(4, 1), 40)
    (path,) = root.glob("iter_0000010/mp_rank_*/model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    encoder = state["model"]["language_model"]["encoder"]
    encoder["final_layernorm.weight"] = encoder["final_norm.weight"]
    torch.save(state, path)
    with pytest.raises(FormatError, match="twice, in two spellings") as error:
        list(LOADER.load(root, {}))
    assert_one_line(error.value)


def test_a_tensor_too_many(tmp_path):
    root = write(tmp_path, TIED, 1, even(4, 1), 40)
    (path,) = root.glob("iter_0000010/mp_rank_*/model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    state["model"]["language_model"]["encoder"]["layers.0.inter_attention.query.weight"] = (
        torch.ones(2)
    )
    torch.save(state, path)
    with pytest.raises(SchemaError, match=r"inter_attention\.query\.weight") as error:
        list(LOADER.load(root, {}))
    assert_one_line(error.value)


@pytest.mark.parametrize(
    ("model", "chosen", "said"),
    [
        (NORMED, {}, "family qwen3 has no legacy layout.*no norms of query and key heads"),
        (tiny("gpt", qk_layernorm=True), {}, "norms of query and key heads"),
        (tiny("gpt", activation="geglu"), {}, "activation geglu"),
        (LLAMA, options(tp=4), "does not divide 2 query groups"),
        (LLAMA, options(tp=3), "does not divide num_attention_heads 8"),
        (LLAMA, options(pp=3), "4 layers do not fit"),
        (LLAMA, options(pp=2, decoder_first_pipeline_num_layers=1), "spread their layers evenly"),
        (LLAMA, options(saver_transformer_impl="transformer_engine"), "leave it at local"),
        (LLAMA, options(target_expert_parallel_size=2), "no experts"),
        (replace(MIXTURE, spec=replace(MIXTURE.spec, moe_router_topk=2)), {}, "one expert per"),
    ],
)
def test_what_legacy_models_cannot_be(model, chosen, said, tmp_path):
    with pytest.raises((PlanError, SchemaError), match=said) as error:
        SAVER.plan(iter(messages(model, tmp_path)), chosen)
    assert_one_line(error.value)


def test_what_legacy_models_compute_otherwise_is_said(tmp_path):
    extra = {"sliding_window": 16}
    scaling = {"rope_type": "llama3", "factor": 8.0}
    model = tiny("mistral", rotary_base=500000.0, rotary_scaling=scaling, extra=extra)
    plan = SAVER.plan(iter(messages(model, tmp_path)), {})
    base, scaled, window, groups = plan.notes
    assert base.startswith("rotary_base 500000: legacy models have 10000 fixed")
    assert scaled.startswith("rope_scaling")
    assert window.startswith("sliding_window 16: legacy models attend to everything")
    assert groups.startswith("2 query groups per rank")
    assert len(SAVER.plan(iter(messages(model, tmp_path / "p")), options(tp=2)).notes) == 3
    root = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", {})
    assert base in end_of(LOADER.load(root, {})).notes


def test_tied_copies_are_compared(tmp_path):
    root = write(tmp_path, GPT_TIED, 2, even(4, 2), 40)
    path = root / "iter_0000010/mp_rank_01_001/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["word_embeddings_for_head"]["weight"][3, 3] += 1
    torch.save(state, path)
    from ckptx.protocol.contracts import SavePlan
    from ckptx.storage.open_files import Files
    from ckptx.testing.conversion import plan_of_messages
    from ckptx.writing.replicas import check_replicas

    sent = list(LOADER.load(root, {}))
    plan: SavePlan = plan_of_messages(sent)
    with pytest.raises(CkptxError, match=r"word embeddings.*differs"):
        check_replicas(plan, Files(begin_of(sent).files), "all")
