"""What several suites share: how cases are drawn, and a small model on disk.

`make test` draws nothing by chance: Hypothesis takes the same examples every time. With
``--hypothesis-profile=drawn`` (`make test-full`, `make nightly`) it draws others, from the seed of
``--hypothesis-seed``, after those that have failed before.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

NO_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **NO_CLOCK)
settings.register_profile("drawn", print_blob=True, **NO_CLOCK)
EXAMPLES = int(os.environ.get("CKPTX_EXAMPLES", "1"))
"""How many times as many examples as usual Hypothesis draws."""
settings.load_profile("fixed")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_llama(directory: Path, shards: int = 1, **changes: Any) -> Path:
    """Write a Llama of 40 kB: ``config.json`` with ``changes``, and one file or ``shards``."""
    config = CONFIG | changes
    generator = np.random.default_rng(0)
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {
        "q_proj": config["num_attention_heads"] * head,
        "k_proj": config["num_key_value_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}.weight": (n, hidden) for part, n in rows.items()}
        shapes[f"{name}self_attn.o_proj.weight"] = (hidden, rows["q_proj"])
        for part in ("gate", "up"):
            shapes[f"{name}mlp.{part}_proj.weight"] = (config["intermediate_size"], hidden)
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, config["intermediate_size"])
        shapes[f"{name}input_layernorm.weight"] = (hidden,)
        shapes[f"{name}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors = {n: generator.standard_normal(s, np.float32) for n, s in shapes.items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    homes = {}
    for number, names in enumerate(np.array_split(list(tensors), shards), 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({str(n): tensors[str(n)] for n in names}, directory / file, {"format": "pt"})
        homes |= {str(name): file for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every property so many more examples."""
    for item in items if EXAMPLES > 1 else ():
        test = getattr(item, "obj", None)
        if chosen := getattr(test, "_hypothesis_internal_use_settings", None):
            more = settings(chosen, max_examples=EXAMPLES * chosen.max_examples)
            getattr(test, "__func__", test)._hypothesis_internal_use_settings = more


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _same_directory() -> Iterator[None]:
    """Every test leaves the current directory as it was: others read files from there."""
    before = Path.cwd()
    yield
    now = Path.cwd()
    os.chdir(before)
    assert now == before, "this test has left its current directory"


@pytest.fixture
def run(capsys):
    """Return a function that runs a command in this process: exit code, stdout, stderr."""
    from ckptx.cli import main as cli

    def run(*words: object, entry=cli.main) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            entry([str(word) for word in words])
        return (int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(name="write_llama", scope="session")
def write_llama_fixture():
    return write_llama
