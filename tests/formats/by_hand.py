"""Checkpoints made with numpy and torch alone, as Megatron lays them out.

Source: NVIDIA/Megatron-LM megatron/core/tensor_parallel/layers.py,
megatron/training/checkpointing.py @ core_v0.16.1.
"""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from ckptx.testing.models import Arrays, TinyModel, write_config
from ckptx.testing.tagged import bits

LAYER = {  # in the names of Transformer Engine; axis of tensor parallelism
    "input norm weight": ("self_attention.linear_qkv.layer_norm_weight", None),
    "input norm bias": ("self_attention.linear_qkv.layer_norm_bias", None),
    "qkv weight": ("self_attention.linear_qkv.weight", 0),
    "qkv bias": ("self_attention.linear_qkv.bias", 0),
    "q norm weight": ("self_attention.q_layernorm.weight", None),
    "k norm weight": ("self_attention.k_layernorm.weight", None),
    "dense weight": ("self_attention.linear_proj.weight", 1),
    "dense bias": ("self_attention.linear_proj.bias", None),
    "post norm weight": ("mlp.linear_fc1.layer_norm_weight", None),
    "post norm bias": ("mlp.linear_fc1.layer_norm_bias", None),
    "mlp l0 weight": ("mlp.linear_fc1.weight", 0),
    "mlp l0 bias": ("mlp.linear_fc1.bias", 0),
    "mlp l1 weight": ("mlp.linear_fc2.weight", 1),
    "mlp l1 bias": ("mlp.linear_fc2.bias", None),
}

Stages = Sequence[Sequence[Sequence[int]]]
"""Layers by pipeline rank and virtual rank."""


def torch_of(array: np.ndarray) -> torch.Tensor:
    """The same bytes as a torch tensor."""
    dtype = getattr(torch, array.dtype.name)
    if not array.size:
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape)


def numpy_of(tensor: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """The same bytes as a numpy array."""
    assert str(tensor.dtype) == f"torch.{like.dtype.name}"
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(like.dtype).reshape(tuple(tensor.shape))


def cut(array: np.ndarray, axis: int | None, tp: int, rank: int) -> np.ndarray:
    return array if axis is None else np.split(array, tp, axis)[rank]


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


def layer_state(keys: Arrays, tp: int, rank: int) -> Arrays:
    found = {
        name: cut(keys[key], axis, tp, rank) for key, (name, axis) in LAYER.items() if key in keys
    }
    for kind in ("weight", "bias"):
        gate, up = keys.get(f"mlp l0 {kind} W"), keys.get(f"mlp l0 {kind} V")
        if gate is not None and up is not None:
            halves = [cut(gate, 0, tp, rank), cut(up, 0, tp, rank)]
            found[f"mlp.linear_fc1.{kind}"] = np.concatenate(halves)
    return found


def rank_state(
    model: TinyModel, layers: Sequence[int], first: bool, last: bool, tp: int, rank: int, rows: int
) -> Arrays:
    """What one rank holds for one pipeline chunk."""
    messages = model.canonical(padded=False)
    state: Arrays = {}
    words = padded(messages["embeddings"]["word embeddings"], rows)
    if first:
        state["embedding.word_embeddings.weight"] = cut(words, 0, tp, rank)
        if "position embeddings" in messages["embeddings"]:
            positions = messages["embeddings"]["position embeddings"]
            state["embedding.position_embeddings.weight"] = positions
    for local, layer in enumerate(layers):
        keys = messages[f"transformer layer {layer}"]
        for name, array in layer_state(keys, tp, rank).items():
            state[f"decoder.layers.{local}.{name}"] = array
    if last:
        for kind, array in messages["final norm"].items():
            state[f"decoder.final_layernorm.{kind}"] = array
        if not model.spec.tied:
            output = padded(messages["output layer"]["weight"], rows)
            state["output_layer.weight"] = cut(output, 0, tp, rank)
        elif not first:
            state["output_layer.weight"] = cut(words, 0, tp, rank)
    return state


def rank_states(
    model: TinyModel, tp: int, stages: Stages, rows: int
) -> Iterator[tuple[str, dict[str, Arrays]]]:
    """Yield the directory of every rank and its models."""
    for pp_rank, chunks in enumerate(stages):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{pp_rank:03d}" if len(stages) > 1 else "")
            models = {}
            for number, layers in enumerate(chunks):
                first = pp_rank == number == 0
                last = (pp_rank, number) == (len(stages) - 1, len(chunks) - 1)
                key = f"model{number}" if len(chunks) > 1 else "model"
                models[key] = rank_state(model, layers, first, last, tp, rank, rows)
            yield name, models


def args_of(model: TinyModel, tp: int, stages: Stages, rows: int) -> Namespace:
    spec = model.spec
    first, *_, last = [sum(map(len, chunks)) for chunks in stages] * 2
    even = len({len(layers) for chunks in stages for layers in chunks}) == 1
    pp, vpp = len(stages), len(stages[0])
    return Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        group_query_attention=spec.num_query_groups != spec.num_attention_heads,
        kv_channels=spec.kv_channels,
        max_position_embeddings=spec.max_position_embeddings,
        normalization=spec.normalization,
        norm_epsilon=spec.norm_epsilon,
        position_embedding_type=spec.position_embedding_type,
        rotary_base=int(spec.rotary_base),
        rotary_percent=1.0,
        swiglu=spec.activation == "swiglu",
        add_bias_linear=spec.add_bias_linear,
        add_qkv_bias=spec.add_qkv_bias,
        qk_layernorm=spec.qk_layernorm,
        untie_embeddings_and_output_weights=not spec.tied,
        vocab_size=spec.vocab_size,
        padded_vocab_size=rows,
        params_dtype=getattr(torch, spec.dtype),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        decoder_first_pipeline_num_layers=None if even else first,
        decoder_last_pipeline_num_layers=None if even else last,
    )


def write_ranks(root: Path, model: TinyModel, tp: int, stages: Stages, rows: int) -> Path:
    """Write a per-rank checkpoint of iteration 10 with torch.save, and return its root."""
    directory = root / "iter_0000010"
    args = args_of(model, tp, stages, rows)
    for name, models in rank_states(model, tp, stages, rows):
        state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 10}
        for key, arrays in models.items():
            state[key] = {n: torch_of(array) for n, array in arrays.items()}
            state[key]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        (directory / name).mkdir(parents=True)
        torch.save(state, directory / name / "model_optim_rng.pt")
    return finished(root, directory, model)


def write_distributed(root: Path, model: TinyModel, rows: int) -> Path:
    """Write a ``torch_dist`` checkpoint of iteration 10 with torch's own writer, layers stacked."""
    directory = root / "iter_0000010"
    stages = [[range(model.spec.num_layers)]]
    ((_, models),) = rank_states(model, 1, stages, rows)
    state: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in models["model"].items():
        if name.startswith("decoder.layers."):
            rest = name.split(".", 3)[3]
            stacks.setdefault(rest, []).append(array)
        else:
            state[name] = torch_of(array)
    for rest, arrays in stacks.items():
        state[f"decoder.layers.{rest}"] = torch_of(np.stack(arrays))
    directory.mkdir(parents=True)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    args = args_of(model, 1, stages, rows)
    torch.save({"args": args, "iteration": 10, "checkpoint_version": 3.0}, directory / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backend))
    return finished(root, directory, model)


def finished(root: Path, directory: Path, model: TinyModel) -> Path:
    if model.spec.family != "gpt":
        write_config(directory / "huggingface", model)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return root


def even(num_layers: int, pp: int, vpp: int = 1) -> Stages:
    """Layers by rank and virtual rank, spread evenly."""
    edges = np.linspace(0, num_layers, pp * vpp + 1).astype(int).tolist()
    chunks = [range(start, stop) for start, stop in pairwise(edges)]
    return [chunks[rank::pp] for rank in range(pp)]


def assert_state(found: Mapping[str, Any], expected: Arrays) -> None:
    """Fail unless a state dict has these tensors, and nothing else but extra states."""
    tensors = {name: v for name, v in found.items() if not name.endswith("_extra_state")}
    assert sorted(tensors) == sorted(expected)
    for name, array in expected.items():
        assert np.array_equal(bits(numpy_of(tensors[name], array)), bits(array)), name
