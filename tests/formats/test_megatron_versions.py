"""Checkpoints that several releases of megatron-core wrote; what belongs where is told by tags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptx.cli.main import main as cli
from ckptx.containers import pickle_reader
from ckptx.schemas.megatron_settings.args import args_of
from tests.golden.megatron.cases import BASES, CASES, DENSE, MIXTURE, VERSIONS

GOLDEN = Path(__file__).parents[1] / "golden" / "megatron"
LAYERS, HIDDEN, VOCAB = DENSE["num_layers"], DENSE["hidden_size"], DENSE["vocab_size"]
HEADS, GROUPS, HEAD = DENSE["num_attention_heads"], DENSE["num_query_groups"], DENSE["kv_channels"]
EXPERTS = MIXTURE["num_moe_experts"]


def whole(key: str, *shape: int) -> np.ndarray:
    """The tensor of a torch_dist key, by its tags."""
    places = np.arange(np.prod(shape), dtype=np.float32) + BASES[key]
    return places.reshape(shape)


def expected(mixture: bool) -> dict[str, np.ndarray]:
    """The tensors under their Hugging Face names, taken out of Megatron's by their definition.

    Rows of linear_qkv are, per group: its query heads, its key head, its value head. Rows of
    linear_fc1 are the gate's, then those of up.
    """
    stack = "decoder.layers."
    found = {
        "model.embed_tokens.weight": whole("embedding.word_embeddings.weight", VOCAB, HIDDEN),
        "lm_head.weight": whole("output_layer.weight", VOCAB, HIDDEN),
        "model.norm.weight": whole("decoder.final_layernorm.weight", HIDDEN),
    }
    attention = stack + "self_attention.linear_"
    per_group = HEADS // GROUPS
    rows = GROUPS * (per_group + 2) * HEAD
    qkv = whole(f"{attention}qkv.weight", LAYERS, rows, HIDDEN)
    heads = qkv.reshape(LAYERS, GROUPS, per_group + 2, HEAD, HIDDEN)
    norm = whole(f"{attention}qkv.layer_norm_weight", LAYERS, HIDDEN)
    proj = whole(f"{attention}proj.weight", LAYERS, HIDDEN, HEADS * HEAD)
    for layer in range(LAYERS):
        to = f"model.layers.{layer}."
        found[f"{to}input_layernorm.weight"] = norm[layer]
        queries = heads[layer, :, :per_group].reshape(HEADS * HEAD, HIDDEN)
        found[f"{to}self_attn.q_proj.weight"] = queries
        for name, place in (("k", per_group), ("v", per_group + 1)):
            one = heads[layer, :, place].reshape(GROUPS * HEAD, HIDDEN)
            found[f"{to}self_attn.{name}_proj.weight"] = one
        found[f"{to}self_attn.o_proj.weight"] = proj[layer]
    return found | (_mixture() if mixture else _dense())


def _dense() -> dict[str, np.ndarray]:
    mlp, inner = "decoder.layers.mlp.linear_", DENSE["ffn_hidden_size"]
    norm = whole(f"{mlp}fc1.layer_norm_weight", LAYERS, HIDDEN)
    fc1 = whole(f"{mlp}fc1.weight", LAYERS, 2 * inner, HIDDEN)
    fc2 = whole(f"{mlp}fc2.weight", LAYERS, HIDDEN, inner)
    found = {}
    for layer in range(LAYERS):
        to = f"model.layers.{layer}."
        found[f"{to}post_attention_layernorm.weight"] = norm[layer]
        found[f"{to}mlp.gate_proj.weight"] = fc1[layer, :inner]
        found[f"{to}mlp.up_proj.weight"] = fc1[layer, inner:]
        found[f"{to}mlp.down_proj.weight"] = fc2[layer]
    return found


def _mixture() -> dict[str, np.ndarray]:
    mlp, inner = "decoder.layers.mlp.", MIXTURE["moe_ffn_hidden_size"]
    norm = whole("decoder.layers.pre_mlp_layernorm.weight", LAYERS, HIDDEN)
    router = whole(f"{mlp}router.weight", LAYERS, EXPERTS, HIDDEN)
    fc1 = whole(f"{mlp}experts.experts.linear_fc1.weight", LAYERS, EXPERTS, 2 * inner, HIDDEN)
    fc2 = whole(f"{mlp}experts.experts.linear_fc2.weight", LAYERS, EXPERTS, HIDDEN, inner)
    found = {}
    for layer in range(LAYERS):
        to = f"model.layers.{layer}."
        found[f"{to}post_attention_layernorm.weight"] = norm[layer]
        found[f"{to}block_sparse_moe.gate.weight"] = router[layer]
        for expert in range(EXPERTS):
            one = f"{to}block_sparse_moe.experts.{expert}."
            found[f"{one}w1.weight"] = fc1[layer, expert, :inner]
            found[f"{one}w3.weight"] = fc1[layer, expert, inner:]
            found[f"{one}w2.weight"] = fc2[layer, expert]
    return found


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        cli([str(argument) for argument in arguments])
    assert ended.value.code == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_is_read(version, case, tmp_path):
    run("convert", GOLDEN / version / case, tmp_path / "hf", "--to", "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = expected(CASES[case].mixture)
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_state_that_ranks_share_is_read_and_not_reported_as_left_out(version, capsys):
    """Since core 0.19 it is an object of the checkpoint, before a file of its own."""
    run("inspect", GOLDEN / version / "dense_tp2")
    assert "common_state" not in capsys.readouterr().out


def test_args_of_a_class_that_is_not_installed_are_read():
    named = b"\x80\x02}X\4\0\0\0argscswift.megatron.argument\nArguments\n)\x81"
    state = b"}X\n\0\0\0num_layersK\2sb"
    found = pickle_reader.loads(named + state + b"s.", file="common.pt")
    assert args_of(found, "common.pt") == {"num_layers": 2}
