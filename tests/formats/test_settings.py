"""Args that change what the same weights compute: refused by name, or undone."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptx

HIDDEN, HEADS, GROUPS, HEAD, FFN, SHARED, EXPERTS, VOCABULARY = 16, 4, 2, 4, 12, 8, 2, 32
ARGS = {
    "num_layers": 1,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_query_groups": GROUPS,
    "group_query_attention": True,
    "kv_channels": HEAD,
    "ffn_hidden_size": FFN,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": VOCABULARY,
    "vocab_size": VOCABULARY,
    "params_dtype": torch.float32,
    "pipeline_model_parallel_size": 1,
}
MIXTURE = {
    "num_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": FFN,
    "moe_shared_expert_intermediate_size": SHARED,
    "moe_shared_expert_gate": True,
    "moe_grouped_gemm": True,
    "use_grouped_gemm_for_shared_expert": True,
    "add_qkv_bias": True,
}


def tagged(kind: int, rows: int) -> np.ndarray:
    """A matrix whose entries say what they are: kind, row and column."""
    row, column = np.indices((rows, HIDDEN))
    return (kind * 10_000 + row * 100 + column).astype(np.float32)


def in_blocks(gate: np.ndarray, up: np.ndarray, size: int) -> np.ndarray:
    """Rows as Megatron reads them: block by block, the gate's first; row by row, by hand."""
    rows = []
    for start in range(0, len(gate), size):
        rows += [gate[start + row] for row in range(size)]
        rows += [up[start + row] for row in range(size)]
    return np.stack(rows)


def in_halves(gate: np.ndarray, up: np.ndarray, _: int) -> np.ndarray:
    return np.concatenate([gate, up])


def dense(part: str, rank: int, tp: int) -> dict[str, torch.Tensor]:
    """What has no experts, of one rank; values do not matter."""
    layer = "decoder.layers.0."
    qkv = (HEADS + 2 * GROUPS) * HEAD // tp
    state = {
        "embedding.word_embeddings.weight": torch.zeros(VOCABULARY // tp, HIDDEN) + rank,
        f"{layer}self_attention.linear_proj.weight": torch.zeros(HIDDEN, HIDDEN // tp) + rank,
        f"{layer}self_attention.linear_qkv.layer_norm_weight": torch.ones(HIDDEN),
        f"{layer}self_attention.linear_qkv.weight": torch.zeros(qkv, HIDDEN) + rank,
        "decoder.final_layernorm.weight": torch.ones(HIDDEN),
        "output_layer.weight": torch.zeros(VOCABULARY // tp, HIDDEN) + rank,
    }
    if part == "dense":
        state |= {
            f"{layer}mlp.linear_fc1.layer_norm_weight": torch.ones(HIDDEN),
            f"{layer}mlp.linear_fc1.weight": torch.zeros(2 * FFN // tp, HIDDEN) + rank,
            f"{layer}mlp.linear_fc2.weight": torch.zeros(HIDDEN, FFN // tp) + rank,
        }
    return state


def mixture(rank: int, tp: int, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A rank of a model with experts; ``sizes`` are those of blocks, 0 for halves."""
    layer = "decoder.layers.0."
    state = dense("experts", rank, tp)
    state[f"{layer}self_attention.linear_qkv.bias"] = torch.zeros(32 // tp) + rank
    state[f"{layer}pre_mlp_layernorm.weight"] = torch.ones(HIDDEN)
    state[f"{layer}mlp.router.weight"] = torch.zeros(EXPERTS, HIDDEN)
    state[f"{layer}mlp.shared_experts.gate_weight"] = torch.zeros(1, HIDDEN)
    state[f"{layer}mlp.shared_experts.linear_fc2.weight"] = torch.zeros(HIDDEN, SHARED // tp) + rank

    def first(kinds: tuple[int, int], rows: int, size: int) -> torch.Tensor:
        gate, up = (np.split(tagged(kind, rows), tp)[rank] for kind in kinds)
        return torch.from_numpy((in_blocks if size else in_halves)(gate, up, size))

    state[f"{layer}mlp.shared_experts.linear_fc1.weight"] = first((7, 8), SHARED, sizes[1])
    for expert in range(EXPERTS):
        kinds = (2 * expert + 1, 2 * expert + 2)
        name = f"{layer}mlp.experts.linear_fc"
        state[f"{name}1.weight{expert}"] = first(kinds, FFN, sizes[0])
        state[f"{name}2.weight{expert}"] = torch.zeros(HIDDEN, FFN // tp) + rank
    return state


def write(root: Path, states: list[dict[str, torch.Tensor]], **args: object) -> Path:
    tp = len(states)
    for rank, state in enumerate(states):
        directory = root / "iter_0000001" / f"mp_rank_{rank:02d}"
        directory.mkdir(parents=True)
        content = {
            "args": Namespace(**ARGS | args, tensor_model_parallel_size=tp, rank=rank),
            "checkpoint_version": 3.0,
            "iteration": 1,
            "model": state,
        }
        torch.save(content, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return root


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sizes", [(3, 4), (6, 0), (0, 2), (0, 0)])
def test_blocks_of_rows_are_put_in_halves(tp, sizes, tmp_path):
    names = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")
    said = {name: size or None for name, size in zip(names, sizes, strict=True)}
    states = [mixture(rank, tp, sizes) for rank in range(tp)]
    source = write(tmp_path / "source", states, **MIXTURE, **said)
    layer = "model.layers.0.mlp."
    expected = {
        f"{layer}experts.0.gate_proj.weight": tagged(1, FFN),
        f"{layer}experts.0.up_proj.weight": tagged(2, FFN),
        f"{layer}experts.1.gate_proj.weight": tagged(3, FFN),
        f"{layer}experts.1.up_proj.weight": tagged(4, FFN),
        f"{layer}shared_expert.gate_proj.weight": tagged(7, SHARED),
        f"{layer}shared_expert.up_proj.weight": tagged(8, SHARED),
    }
    with ckptx.open(source) as checkpoint:
        for name, values in expected.items():
            np.testing.assert_array_equal(checkpoint[name][...], values)
    # What is written for Megatron has halves, and its args say so.
    ckptx.convert(source, tmp_path / "core", to="core", tp=1, ckpt_format="torch")
    written = torch.load(
        tmp_path / "core" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt",
        weights_only=False,
    )
    assert not any(getattr(written["args"], name, None) for name in names)
    fused = written["model"]["decoder.layers.0.mlp.experts.linear_fc1.weight1"]
    np.testing.assert_array_equal(fused.numpy(), np.concatenate([tagged(3, FFN), tagged(4, FFN)]))


@pytest.mark.parametrize("switch", ["moe_grouped_gemm", "use_grouped_gemm_for_shared_expert"])
def test_blocks_that_no_module_reads_are_refused(switch, tmp_path):
    sizes = {"moe_mlp_glu_interleave_size": 3, "moe_shared_expert_glu_interleave_size": 4}
    name = "moe_mlp" if switch == "moe_grouped_gemm" else "moe_shared_expert"
    said = {**MIXTURE, **sizes, switch: False}
    source = write(tmp_path / "source", [mixture(0, 1, (3, 4))], **said)
    with pytest.raises(ckptx.SchemaError, match=f"{name}_glu_interleave_size .* without {switch}"):
        ckptx.convert(source, tmp_path / "out", to="hf")


def test_blocks_that_do_not_divide_are_refused(tmp_path):
    said = {**MIXTURE, "moe_mlp_glu_interleave_size": 5}
    source = write(tmp_path / "source", [mixture(0, 1, (0, 0))], **said)
    with pytest.raises(ckptx.SchemaError, match="5 does not divide 12 rows on 1 ranks"):
        ckptx.convert(source, tmp_path / "out", to="hf")


CHANGING = {
    "softmax_scale": 0.5,
    "softmax_type": "off-by-one",
    "activation_func_clamp_value": 0.5,
    "glu_linear_offset": 1.0,
    "use_mup": True,
    "mup_output_mult": 0.5,
    "apply_residual_connection_post_layernorm": True,
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_setting_that_changes_the_function_is_refused_by_name(name, tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], **{name: CHANGING[name]})
    for to in ("hf", "dcp", "legacy"):
        with pytest.raises(ckptx.SchemaError, match=name):
            ckptx.convert(source, tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("name", CHANGING)
def test_a_setting_stays_where_megatron_reads_the_result(name, tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], **{name: CHANGING[name]})
    ckptx.convert(source, tmp_path / "core", to="core", ckpt_format="torch")
    file = tmp_path / "core" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    assert getattr(torch.load(file, weights_only=False)["args"], name) == CHANGING[name]
    with pytest.raises(ckptx.SchemaError, match=name):  # the second time, too
        ckptx.convert(tmp_path / "core", tmp_path / "hf", to="hf")


def test_an_accepted_setting_is_in_report_and_manifest(tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], softmax_scale=0.5, own_switch=True)
    report = ckptx.convert(source, tmp_path / "hf", to="hf", accept_arg=["softmax_scale"])
    assert "softmax_scale is 0.5 in args and was ignored (--accept-arg)" in report.notes
    assert any("'own_switch', which no release of Megatron has" in note for note in report.notes)
    manifest = json.loads((tmp_path / "hf" / "ckptx-manifest.json").read_text())
    assert manifest["source"]["accepted"] == ["softmax_scale"]
    with pytest.raises(ckptx.PlanError, match="args have no soft_scale"):
        ckptx.convert(source, tmp_path / "other", to="hf", accept_arg=["soft_scale"])


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "moe_latent_size", "retro_add_retriever"])
def test_another_structure_is_refused_at_reading(name, tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], **{name: "M*"})
    with pytest.raises(ckptx.SchemaError, match=f"{name} is 'M\\*' in args"):
        ckptx.convert(source, tmp_path / "core", to="core")


def test_two_activations_are_a_contradiction(tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], quick_geglu=True)
    with pytest.raises(ckptx.SchemaError, match="swiglu and quick_geglu are set"):
        ckptx.convert(source, tmp_path / "hf", to="hf")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", "many", "expected a whole number of at least 1"),
        ("num_attention_heads", 0, "expected a whole number of at least 1"),
        ("num_layers", 2.0, "expected a whole number of at least 1"),
        ("rotary_base", "x", "expected a number of at least 0"),
        ("norm_epsilon", [1e-5], "expected a number of at least 0"),
        ("add_qkv_bias", "no", "expected true or false"),
        ("normalization", 3, "expected a word"),
        ("window_size", 5, "a value of the checkpoint's args is not what Megatron has there"),
    ],
)
def test_an_argument_of_another_type_is_named(tmp_path, name, value, expected):
    source = write(tmp_path / "core", [dense("dense", 0, 1)], **{name: value})
    with pytest.raises(ckptx.SchemaError, match=expected) as refused:
        ckptx.convert(source, tmp_path / "hf", to="hf")
    assert name in str(refused.value) or name == "window_size"
    found = ckptx.inspect(source)
    assert not found.healthy
    assert any(expected in problem.message for problem in found.problems)


def test_what_depends_on_a_batch_is_said(tmp_path):
    source = write(tmp_path / "source", [dense("dense", 0, 1)], moe_expert_capacity_factor=1.5)
    report = ckptx.convert(source, tmp_path / "hf", to="hf")
    assert any("moe_expert_capacity_factor is 1.5 in args: drops" in note for note in report.notes)
    plain = write(tmp_path / "plain", [dense("dense", 0, 1)], moe_expert_capacity_factor=None)
    report = ckptx.convert(plain, tmp_path / "other", to="hf")
    assert not any("capacity" in note for note in report.notes)
