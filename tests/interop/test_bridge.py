"""Megatron-Bridge itself loads what we write for it, and we read what it saves."""

from __future__ import annotations

import pytest

from tests.oracles import bridge
from tests.oracles.mcore import Layout

from .conversion import CLOSE, LONG_TOKENS, TOKENS, convert, difference, sizes, strict_logits

pytestmark = pytest.mark.skipif(bridge.place() is None, reason="no Megatron-Bridge here")
LAYOUTS = {"llama": Layout(tp=2, pp=2), "qwen2-tied": Layout(), "mixtral": Layout(ep=2)}


@pytest.mark.parametrize(
    "family", ["llama", "mixtral", pytest.param("qwen2-tied", marks=pytest.mark.full)]
)
def test_it_loads_what_we_write(family, source_of, tmp_path):
    source, layout = source_of(family), LAYOUTS[family]
    facts = convert(
        *(source.directory, tmp_path / "core", "core"), target_writer="bridge", **sizes(layout)
    )
    (place,) = tmp_path.glob("core/iter_*")
    assert f'load_megatron_model("{{target}}/{place.name}")' in facts.load_hint
    found = bridge.read(place, source.tokens)
    assert difference(found[..., : source.config.vocab_size], source.logits) <= CLOSE


SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
LLAMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 131,
    "should_pad_vocab": True,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": SILU,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "seq_length": 64,
}
SAVED = {
    "llama": ("gpt_provider.GPTModelProvider", LLAMA),
    "llama3": ("gpt_provider.GPTModelProvider", LLAMA | {"rope_scaling": True}),
    "mixtral": (
        "gpt_provider.GPTModelProvider",
        LLAMA | {"num_moe_experts": 4, "moe_grouped_gemm": True},
    ),
    "gemma": (
        "gemma.gemma_provider.GemmaModelProvider",
        LLAMA
        | {
            "activation_func": {"_target_": "megatron.core.activations.fast_gelu", "_call_": False},
            "share_embeddings_and_output_weights": True,
            "layernorm_zero_centered_gamma": True,
            "bf16": False,
            "params_dtype": {"_target_": "torch.float32", "_call_": False},
        },
    ),
}


@pytest.mark.parametrize(
    "case",
    ["gemma", "mixtral", *(pytest.param(n, marks=pytest.mark.full) for n in ("llama", "llama3"))],
)
def test_we_read_what_it_saves(case, tmp_path):
    tokens = LONG_TOKENS if case == "llama3" else TOKENS
    expected = bridge.write(tmp_path / "bridge", *SAVED[case], tokens)
    convert(tmp_path / "bridge", tmp_path / "hf", "hf")
    found = strict_logits(tmp_path / "hf", tokens)
    assert difference(found, expected[..., :131]) <= CLOSE
