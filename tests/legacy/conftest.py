"""Modules in the manner of Megatron's tools/checkpoint, written for these tests, run unmodified."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptx.registry import registry

LOADER = """
import json, sys, types

def add_arguments(parser):
    group = parser.add_argument_group(title="Toy loader")
    group.add_argument("--true-vocab-size", type=int, default=None, help="true vocabulary")
    group.add_argument("--megatron-path", type=str, default=None)
    group.add_argument("--seed", type=int, required=True)
    group.add_argument("--fault", default=None)

def load_checkpoint(queue, args):
    try:
        _load_checkpoint(queue, args)
    except:
        queue.put("exit")
        raise

def weights(seed):
    import torch
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g).bfloat16()
    yield "embeddings", {"word embeddings": new(20, 8)}
    for i in range(2):
        layer = {"input norm weight": new(8), "qkv weight": new(16, 8), "dense weight": new(8, 8)}
        layer |= {"post norm weight": new(8), "mlp l0 weight W": new(12, 8)}
        layer |= {"mlp l0 weight V": new(12, 8), "mlp l1 weight": new(12, 8).t()}
        yield f"transformer layer {i}", layer
    yield "final norm", {"weight": new(8)}
    yield "output layer", {"weight": new(20, 8)}

def _load_checkpoint(queue, args):
    sys.argv = ["script.py", "--rewritten"]
    print("Loading...")
    with open(args.load_dir + "/args.json", "w") as f:
        json.dump({k: v for k, v in vars(args).items() if k != "params_dtype"}, f, default=str)
    if args.fault == "exit":
        queue.put("exit")
        sys.exit(1)
    if args.fault == "raise":
        raise RuntimeError("toy trouble")
    import torch
    margs = types.SimpleNamespace(group_query_attention=True, num_query_groups=2, kv_channels=2,
        ffn_hidden_size=12, norm_epsilon=1e-6, rotary_base=500000, normalization="RMSNorm",
        sequence_parallel=False, params_dtype=torch.bfloat16)
    md = types.SimpleNamespace(model_type=args.model_type, num_layers=2, hidden_size=8,
        seq_length=64, num_attention_heads=4, max_position_embeddings=64, tokenizer_type="Null",
        iteration=7, params_dtype=torch.bfloat16, bert_binary_head=False, output_layer=True,
        position_embedding_type="rope", linear_bias=False, qkv_bias=False, norm_has_bias=False,
        swiglu=True, previous_tensor_parallel_size=1, previous_pipeline_parallel_size=1,
        true_vocab_size=args.true_vocab_size, make_vocab_size_divisible_by=None,
        checkpoint_args=margs, consumed_train_samples=11, consumed_valid_samples=0)
    queue.put(md)
    messages = list(weights(args.seed))
    if args.fault == "order":
        messages[1], messages[2] = messages[2], messages[1]
    for name, message in messages:
        message["name"] = name
        queue.put(message)
    if args.fault != "no done":
        queue.put("done")
"""

SAVER = """
import os, sys

def add_arguments(parser):
    group = parser.add_argument_group(title="Toy saver")
    group.add_argument("--megatron-path", type=str, default=None)
    group.add_argument("--target-tensor-parallel-size", type=int)
    group.add_argument("--saver-fault", default=None)

def save_checkpoint(queue, args):
    md = queue.get()
    if args.target_tensor_parallel_size is None:
        args.target_tensor_parallel_size = md.previous_tensor_parallel_size
    if args.saver_fault == "exit":
        print("Exiting saver")
        exit(1)
    state = {"md": vars(md) | {"checkpoint_args": vars(md.checkpoint_args)}}
    def get(name):
        message = queue.get()
        if message == "exit":
            exit(1)
        if args.checking and message["name"] != name:
            exit(1)
        message.pop("name")
        state[name] = message
    get("embeddings")
    if args.saver_fault == "early":
        return
    for i in range(md.num_layers):
        get(f"transformer layer {i}")
    get("final norm")
    if md.output_layer:
        get("output layer")
    assert queue.get() == "done"
    import torch
    folder = os.path.join(args.save_dir, f"iter_{md.iteration:07d}", "mp_rank_00")
    os.makedirs(folder)
    state["seen"] = {"tp": args.target_tensor_parallel_size, "load_dir": args.load_dir,
        "true_vocab_size": args.true_vocab_size if hasattr(args, "true_vocab_size") else None}
    torch.save(state, os.path.join(folder, "toy.pt"))
    with open(os.path.join(args.save_dir, "latest_checkpointed_iteration.txt"), "w") as f:
        f.write(str(md.iteration))
"""


class Toolbox:
    """A folder of modules on the Python path, a source and a target."""

    def __init__(self, root: Path) -> None:
        self.path = root / "tools"
        self.source = root / "source"
        self.target = root / "target"
        self.path.mkdir()
        self.source.mkdir()
        (self.path / "loader_toy.py").write_text(LOADER)
        (self.path / "saver_toy.py").write_text(SAVER)
        (self.path / "plain_toy.py").write_text(LOADER + SAVER.replace("add_arguments", "_unused"))

    def convert(self, *arguments: str, path: Path | None = None) -> tuple[int, str, str]:
        """Run ``convert.py`` as a user of Megatron's converter would."""
        root = Path(registry.__file__).resolve().parents[2]
        done = subprocess.run(
            [
                *(sys.executable, root / "convert.py"),
                *("--load-dir", self.source, "--save-dir", self.target),
                *arguments,
            ],
            env={**os.environ, "PYTHONPATH": str(path or self.path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tools(tmp_path):
    return Toolbox(tmp_path)
