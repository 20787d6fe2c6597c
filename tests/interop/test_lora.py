"""LoRA: what ckptx merges on the way is, bit for bit, what peft merges in memory."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptx import manager
from ckptx.errors import CkptxError
from tests.oracles import hf

from .conversion import CLOSE, TOKENS, contents, convert, difference, strict_logits

adapters = pytest.importorskip("tests.oracles.adapters", reason="peft is not installed")

ATTENTION = ["q_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"num_hidden_layers": 2}

BASES = {
    "llama": (hf.llama, SMALL | {"attention_bias": True}),
    "llama-bf16": (hf.llama, SMALL | {"attention_bias": True, "dtype": torch.bfloat16}),
    "llama-fp16": (hf.llama, SMALL | {"dtype": torch.float16}),
    "qwen2": (hf.qwen2, SMALL),
    "qwen2-tied": (hf.qwen2, SMALL | {"tied": True}),
    "gpt2": (hf.gpt2, {"n_layer": 2}),
    "qwen3_moe": (hf.qwen3_moe, SMALL),
    "mixtral": (hf.mixtral, SMALL),
    "gemma2": (hf.gemma2, SMALL),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    @cache
    def written(name):
        directory = tmp_path_factory.mktemp(name) / "base"
        write, overrides = BASES[name]
        write(directory, **overrides)
        return directory

    return written


VARIANTS = {
    "plain": ("llama", {"target_modules": EVERY, "r": 8, "lora_alpha": 16}),
    "bf16": ("llama-bf16", {"target_modules": EVERY, "r": 8, "lora_alpha": 12}),
    "fp16": ("llama-fp16", {"target_modules": EVERY, "r": 3, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": ATTENTION, "r": 6, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": EVERY,
            "r": 4,
            "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, r".*down_proj": 32},
        },
    ),
    "lora_bias": ("llama-bf16", {"target_modules": ATTENTION, "r": 4, "lora_bias": True}),
    "bias-all": ("llama", {"target_modules": ["q_proj"], "r": 4, "bias": "all"}),
    "bias-lora": ("qwen2", {"target_modules": ["q_proj"], "r": 4, "bias": "lora_only"}),
    "embedding": ("llama-bf16", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "saved": (
        "llama-bf16",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "tokens": (
        "llama-bf16",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 130]},
    ),
    "tokens-dict": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [0, 1]}},
    ),
    "tokens-tied": (
        "qwen2-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    ),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "unknown-family": ("gemma2", {"target_modules": EVERY, "r": 4}),
    "parameter": ("llama-bf16", {"target_parameters": ["q_proj.weight"], "r": 4}),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 2,
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "experts-one": (
        "mixtral",
        {"target_modules": ["gate"], "target_parameters": ["experts.down_proj"], "r": 2},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_bit_is_that_of_peft(variant, base_of, tmp_path):
    name, config = VARIANTS[variant]
    base, adapter = base_of(name), tmp_path / "adapter"
    adapters.make(base, adapter, **config)
    expected = adapters.merged(base, [adapter], tmp_path / "peft")
    assert manager.detect(adapter) == "peft"
    facts = convert(adapter, tmp_path / "hf", "hf", hf_base=base)
    found = hf.weights(tmp_path / "hf")
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    before = hf.weights(base)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    reported = {key for step, keys in facts.inexact.items() if "LoRA" in step for key in keys}
    dropped = " ".join(one["name"] for one in facts.dropped)
    assert changed  # the adapter does something
    assert changed <= reported | {key for key in changed if key in dropped}
    assert not (tmp_path / "hf" / "adapter_config.json").exists()
    strict_logits(tmp_path / "hf", TOKENS)
