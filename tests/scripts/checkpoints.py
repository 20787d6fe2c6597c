"""Small real checkpoints under the names that the documents use, each saved by its framework."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_llama
from tests.oracles import fsdp, rlinf, verl

GOLDEN = Path(__file__).parents[1] / "golden" / "deepspeed"
LLAMA = {"head_dim": 8, "hidden_size": 32, "num_hidden_layers": 2}


def make(place: Path) -> None:
    """Write all of them into an empty directory."""
    base = write_llama(place / "llama", **LLAMA)
    verl.save(base, place / "run" / "global_step_10" / "actor", world=2)
    fsdp.save(base, place / "fsdp", world=2)
    merged = place / "checkpoint-12" / "pytorch_model_fsdp_0"
    fsdp.save(base, merged, 2, ("model",), optimizer=False)  # as accelerate does
    actor = place / "global_step_20" / "actor"
    rlinf.save(base, actor, world=2)
    state = actor / "model_state_dict" / "full_weights.pt"
    state.parent.mkdir()
    torch.save(load_file(base / "model.safetensors"), state)
    deepspeed(place)


def deepspeed(place: Path) -> None:
    """Copy a checkpoint of DeepSpeed, and write the model that its training began with."""
    shutil.copytree(GOLDEN / "zero3_bf16", place / "checkpoint-3")
    base = place / "base"
    shutil.copytree(GOLDEN / "model", base)
    trained = load_file(GOLDEN / "zero3_bf16.safetensors")
    save_file(
        {name: torch.zeros_like(t) for name, t in trained.items()}, base / "model.safetensors"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
