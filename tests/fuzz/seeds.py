"""Make the seeds of the corpus: small files, as torch and others write them.

python -m tests.fuzz.seeds
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict

import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save

from tests.conftest import CONFIG
from tests.fuzz.targets import CORPUS, DCP_ITEMS


def pickled(value: object) -> bytes:
    """The pickle that ``torch.save`` puts into its archive."""
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        return archive.read("archive/data.pkl")


def put(target: str, name: str, data: bytes) -> None:
    """Write one seed."""
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)


def main() -> None:
    """Write all seeds."""
    storage = torch.zeros(16)  # the one that the targets have
    tensors = {"model.norm.weight": storage[:4], "b": storage[4:8].view(2, 2)}
    put(
        "safetensors_header",
        "two",
        save({"a": torch.ones(4), "b": torch.zeros(2, 2)}, {"format": "pt"}),
    )
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    put("torch_archive", "one", stream.getvalue())
    args = argparse.Namespace(num_layers=1, hidden_size=4, num_attention_heads=2)
    plain = {"a": [1, 2.5, None, True], "b": (b"x", "y"), "c": {1, 2}, "d": OrderedDict(e=2**70)}
    values = {
        "plain": plain,
        "tensors": OrderedDict(tensors),
        "rank": {"model": OrderedDict(tensors), "args": args, "iteration": 1},
        "states": {"module": tensors, "dp_world_size": 1, "param_shapes": [OrderedDict(a=[4])]},
        "parameter": {"a": torch.nn.Parameter(storage[:4])},
    }
    for name, value in values.items():
        for target in ("unpickler", "pickle_values", "shares", "rank_file", "deepspeed"):
            put(target, name, pickled(value))
    for protocol in (0, 2, 4, 5):
        put("unpickler", f"protocol{protocol}", pickle.dumps(plain, protocol))
    directory = CORPUS.parent / "seed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save({"model": tensors, "step": 1}, checkpoint_id=directory, no_dist=True)
    put("dcp_metadata", "two", (directory / ".metadata").read_bytes())
    (directory / "__0_0.distcp").replace(DCP_ITEMS)
    (directory / ".metadata").unlink()
    directory.rmdir()
    put("config", "llama", json.dumps(CONFIG).encode())
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    put("config", "mixtral", json.dumps(CONFIG | moe).encode())
    deep = {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 4, "q_lora_rank": 8}
    put("config", "deepseek", json.dumps(CONFIG | deep).encode())
    sizes = {"dim": 4, "n_layers": 1, "n_heads": 2, "vocab_size": 4, "norm_eps": 1e-5}
    put("params", "llama", json.dumps(sizes | {"multiple_of": 4, "rope_theta": 10000.0}).encode())
    put("index", "one", json.dumps({"metadata": {}, "weight_map": {"a": "s.safetensors"}}).encode())


if __name__ == "__main__":
    main()
