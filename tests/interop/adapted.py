"""The models whose adapters the tests of LoRA merge."""

from __future__ import annotations

import torch

from tests.oracles import hf

SMALL = {"num_hidden_layers": 2}

BASES = {
    "llama": (hf.llama, SMALL | {"attention_bias": True}),
    "llama-bf16": (hf.llama, SMALL | {"attention_bias": True, "dtype": torch.bfloat16}),
    "llama-fp16": (hf.llama, SMALL | {"dtype": torch.float16}),
    "qwen2": (hf.qwen2, SMALL),
    "qwen2-bf16": (hf.qwen2, SMALL | {"dtype": torch.bfloat16}),
    "qwen2-tied": (hf.qwen2, SMALL | {"tied": True}),
    "gpt2": (hf.gpt2, {"n_layer": 2}),
    "qwen3_moe": (hf.qwen3_moe, SMALL),
    "mixtral": (hf.mixtral, SMALL),
    "gemma2": (hf.gemma2, SMALL),
    "unknown": (hf.granite, SMALL),
    "unknown-tied": (hf.granite, SMALL | {"tie_word_embeddings": True}),
}
