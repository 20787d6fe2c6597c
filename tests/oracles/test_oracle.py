"""The harness itself: megatron-core agrees with itself at every layout, and with transformers."""

from __future__ import annotations

import dataclasses
import pickle
from typing import TYPE_CHECKING

import pytest
import torch

from . import hf, mcore
from .mcore import Layout, Model, OracleError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

pytest.importorskip("megatron.core")

TOKENS = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(1))
LONG_TOKENS = torch.randint(0, 131, (1, 1024), generator=torch.Generator().manual_seed(2))
LAYOUTS = {
    "tp1": Layout(),
    "tp2-pp2": Layout(tp=2, pp=2),
    "pp2-vpp2": Layout(pp=2, vpp=2),
    "pp2-first1": Layout(pp=2, first=1),
    "pp4": Layout(pp=4),
    "tp2-pp2-layout": Layout(tp=2, pp=2, layout="Et|tt||tL"),
    "pp2-embedding-loss": Layout(pp=2, embedding_in_split=True, loss_in_split=True),
}
CLOSE = 1e-5


def llama(spec: str = "te", **config: object) -> Model:
    sizes = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "activation_func": "silu",
        "gated_linear_unit": True,
    }
    gpt = {
        "vocab_size": 256,
        "max_sequence_length": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    return Model(sizes | config, gpt, spec)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.isfinite().all()
    return float((a - b).abs().nan_to_num(torch.inf).max())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return each spec's logits of the whole model in one process."""
    return {
        spec: mcore.write(llama(spec), Layout(), tmp_path_factory.mktemp(spec), TOKENS)
        for spec in ("te", "local")
    }


def test_te_stand_in_computes_what_the_local_spec_computes(reference: dict[str, torch.Tensor]):
    assert reference["te"].std() > 0.1
    assert difference(reference["te"], reference["local"]) <= CLOSE


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_read_equals_write_at_any_layout(
    layout: Layout, spec: str, format: str, tmp_path: Path, reference: dict[str, torch.Tensor]
):
    written = mcore.write(llama(spec), layout, tmp_path, TOKENS, format=format)
    assert difference(written, reference[spec]) <= CLOSE
    assert (
        difference(mcore.read(llama(spec), layout, tmp_path, TOKENS, format=format), written) == 0
    )


def test_torch_dist_reshards(tmp_path: Path):
    written = mcore.write(llama(), Layout(tp=2, pp=2), tmp_path, TOKENS)
    for layout in (Layout(tp=4), Layout(pp=2, vpp=2), Layout(pp=4)):
        assert difference(mcore.read(llama(), layout, tmp_path, TOKENS), written) <= CLOSE
    local = mcore.read(llama("local"), Layout(), tmp_path, TOKENS)
    assert difference(local, written) <= CLOSE


@pytest.mark.parametrize("args_names", ["0.16", "0.15"])
@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_model_comes_from_args_alone(format: str, args_names: str, tmp_path: Path):
    model = llama(add_qkv_bias=True, qk_layernorm=True, layernorm_epsilon=1e-3)
    layout = Layout(tp=2, pp=2)
    written = mcore.write(
        model, layout, tmp_path, TOKENS, format=format, args_names=args_names, iteration="release"
    )
    assert (tmp_path / "release").is_dir()
    assert difference(mcore.read(None, layout, tmp_path, TOKENS, format=format), written) == 0
    args = mcore.checkpoint_args(tmp_path, format=format)
    assert args.params_dtype == torch.float32
    assert hasattr(args, "norm_epsilon") == (args_names == "0.15")


def test_tied_layernorm_biased_gelu_model(tmp_path: Path):
    model = dataclasses.replace(
        llama(),
        config={
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "activation_func": "gelu_tanh",
        },
        gpt={
            "vocab_size": 256,
            "max_sequence_length": 64,
            "share_embeddings_and_output_weights": True,
        },
    )
    expected = mcore.write(model, Layout(), tmp_path / "whole", TOKENS)
    for format in ("torch_dist", "torch"):
        written = mcore.write(model, Layout(tp=2, pp=2), tmp_path / format, TOKENS, format=format)
        assert difference(written, expected) <= CLOSE
        read = mcore.read(None, Layout(tp=2, pp=2), tmp_path / format, TOKENS, format=format)
        assert difference(read, written) == 0


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, ep=2), Layout(tp=2, pp=2, ep=2, etp=1)], ids=["etp2", "etp1"]
)
def test_experts(layout: Layout, grouped: bool, tmp_path: Path):
    model = llama(
        num_moe_experts=4,
        moe_ffn_hidden_size=48,
        moe_grouped_gemm=grouped,
        moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none",
    )
    expected = mcore.write(model, Layout(), tmp_path / "whole", TOKENS)
    for format in ("torch_dist", "torch"):
        written = mcore.write(model, layout, tmp_path / format, TOKENS, format=format)
        assert difference(written, expected) <= CLOSE
        read = mcore.read(model, layout, tmp_path / format, TOKENS, format=format)
        assert difference(read, written) == 0


def test_load_is_strict(tmp_path: Path):
    mcore.write(llama(), Layout(tp=2), tmp_path, TOKENS)
    metadata_file = tmp_path / "iter_0000010" / ".metadata"
    metadata = pickle.loads(metadata_file.read_bytes())
    del metadata.state_dict_metadata["decoder.final_layernorm._extra_state/shard_0_1"]
    metadata_file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        OracleError, match=r"(?s)rank \d.*Missing key.*final_layernorm._extra_state"
    ):
        mcore.read(llama(), Layout(tp=2), tmp_path, TOKENS)


def test_tensor_that_is_not_covered_shows_as_nan(tmp_path: Path):
    mcore.write(llama(), Layout(tp=2), tmp_path, TOKENS)
    metadata_file = tmp_path / "iter_0000010" / ".metadata"
    metadata = pickle.loads(metadata_file.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    metadata_file.write_bytes(pickle.dumps(metadata))
    assert mcore.read(llama(), Layout(tp=2), tmp_path, TOKENS).isnan().any()


def test_rank_that_hangs_is_ended(tmp_path: Path):
    mcore.write(llama(), Layout(tp=2), tmp_path, TOKENS)
    with pytest.raises(OracleError, match="did not finish in time"):
        mcore.read(llama(), Layout(tp=2), tmp_path, TOKENS, timeout=0.01)
    assert mcore.read(llama(), Layout(tp=2), tmp_path, TOKENS).isfinite().all()


def mcore_weights(directory: Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Map a llama-like HF model to one rank's megatron TE names, from the two forward passes."""
    weights = hf.weights(directory)
    model: dict[str, torch.Tensor] = {}

    def vocabulary(name: str) -> torch.Tensor:
        table = weights[name]
        return torch.cat([table, torch.zeros(256 - len(table), table.shape[1])])

    model["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight")
    if not config.tie_word_embeddings:
        model["output_layer.weight"] = vocabulary("lm_head.weight")
    model["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" not in weights:
                continue
            q, k, v = (
                weights[f"{attention}{letter}_proj.{kind}"].chunk(config.num_key_value_heads)
                for letter in "qkv"
            )
            model[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(
                [part for group in zip(q, k, v, strict=True) for part in group]
            )
        for letter in "qk":
            if f"{attention}{letter}_norm.weight" in weights:
                norm = weights[f"{attention}{letter}_norm.weight"]
                model[f"{ours}self_attention.{letter}_layernorm.weight"] = norm
        model |= {
            f"{ours}self_attention.linear_qkv.layer_norm_weight": weights[
                f"{theirs}input_layernorm.weight"
            ],
            f"{ours}self_attention.linear_proj.weight": weights[f"{attention}o_proj.weight"],
            f"{ours}mlp.linear_fc1.layer_norm_weight": weights[
                f"{theirs}post_attention_layernorm.weight"
            ],
            f"{ours}mlp.linear_fc1.weight": torch.cat(
                [weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]
            ),
            f"{ours}mlp.linear_fc2.weight": weights[f"{mlp}down_proj.weight"],
        }
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (hf.llama, {}),
        (hf.llama, {"num_key_value_heads": 2}),
        (hf.llama3_rope, {}),
        (hf.mistral, {"sliding_window": 5}),
        (hf.mistral, {}),
        (hf.qwen2, {"tied": True}),
        (hf.qwen2, {}),
        (hf.qwen3, {"tied": True}),
    ],
)
def test_megatron_computes_what_transformers_computes(family, options: dict, tmp_path: Path):
    config = family(tmp_path / "hf", **options)
    tokens = LONG_TOKENS if family is hf.llama3_rope else TOKENS
    expected = hf.logits(tmp_path / "hf", tokens)
    model = hf.mcore_model(hf.config(tmp_path / "hf"))
    mcore.write(model, Layout(), tmp_path / "mcore", TOKENS, format="torch")
    file = tmp_path / "mcore" / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    saved = {"model": mcore_weights(tmp_path / "hf", config)}
    torch.save(saved, file)
    logits = mcore.read(model, Layout(), tmp_path / "mcore", tokens, format="torch", strict=False)
    assert expected.std() > 0.1
    assert difference(logits[..., : config.vocab_size], expected) <= CLOSE
