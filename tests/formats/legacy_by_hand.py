"""Legacy Megatron checkpoints of tiny models, cut and ordered with numpy and torch alone."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np

from ckptx.testing.models import Arrays, TinyModel
from tests.oracles import legacy

from .by_hand import Stages, args_of, cut, finished, padded, torch_of

LAYER = {  # axis of tensor parallelism
    "input norm weight": ("input_norm.weight", None),
    "input norm bias": ("input_norm.bias", None),
    "qkv weight": ("self_attention.query_key_value.weight", 0),
    "qkv bias": ("self_attention.query_key_value.bias", 0),
    "dense weight": ("self_attention.dense.weight", 1),
    "dense bias": ("self_attention.dense.bias", None),
    "post norm weight": ("post_attention_norm.weight", None),
    "post norm bias": ("post_attention_norm.bias", None),
    "mlp l0 weight": ("mlp.dense_h_to_4h.weight", 0),
    "mlp l0 bias": ("mlp.dense_h_to_4h.bias", 0),
    "mlp l1 weight": ("mlp.dense_4h_to_h.weight", 1),
    "mlp l1 bias": ("mlp.dense_4h_to_h.bias", None),
}
MODEL = "language_model."


def layer_state(keys: Arrays, tp: int, rank: int) -> Arrays:
    found = {
        name: cut(keys[key], axis, tp, rank) for key, (name, axis) in LAYER.items() if key in keys
    }
    for kind in ("weight", "bias"):
        if f"mlp l0 {kind} W" in keys:
            halves = [cut(keys[f"mlp l0 {kind} {half}"], 0, tp, rank) for half in "WV"]
            found[f"mlp.dense_h_to_4h.{kind}"] = np.concatenate(halves)
    return found


def rank_state(
    model: TinyModel, layers, first: bool, last: bool, tp: int, rank: int, rows: int
) -> Arrays:
    """What one rank holds for one pipeline chunk, by name, in version 3's order."""
    messages = model.canonical(padded=False)
    words = padded(messages["embeddings"]["word embeddings"], rows)
    state: Arrays = {}
    if first:
        state[f"{MODEL}embedding.word_embeddings.weight"] = cut(words, 0, tp, rank)
        if "position embeddings" in messages["embeddings"]:
            positions = messages["embeddings"]["position embeddings"]
            state[f"{MODEL}embedding.position_embeddings.weight"] = positions
    for local, layer in enumerate(layers):
        for name, array in layer_state(messages[f"transformer layer {layer}"], tp, rank).items():
            state[f"{MODEL}encoder.layers.{local}.{name}"] = array
    if last:
        for kind, array in messages["final norm"].items():
            state[f"{MODEL}encoder.final_norm.{kind}"] = array
        if not model.spec.tied:
            output = padded(messages["output layer"]["weight"], rows)
            state[f"{MODEL}output_layer.weight"] = cut(output, 0, tp, rank)
        elif not first:
            state["word_embeddings_for_head.weight"] = cut(words, 0, tp, rank)
    return state


def rank_states(
    model: TinyModel, tp: int, stages: Stages, rows: int
) -> dict[str, dict[str, Arrays]]:
    """The models of every rank's directory."""
    found: dict[str, dict[str, Arrays]] = {}
    for pp_rank, chunks in enumerate(stages):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{pp_rank:03d}" if len(stages) > 1 else "")
            for number, layers in enumerate(chunks):
                first = pp_rank == number == 0
                last = (pp_rank, number) == (len(stages) - 1, len(chunks) - 1)
                key = f"model{number}" if len(chunks) > 1 else "model"
                state = rank_state(model, layers, first, last, tp, rank, rows)
                found.setdefault(name, {})[key] = state
    return found


def legacy_args(model: TinyModel, tp: int, stages: Stages, rows: int) -> Namespace:
    args = args_of(model, tp, stages, rows)
    args.use_legacy_models = True
    return args


def write(
    root: Path,
    model: TinyModel,
    tp: int,
    stages: Stages,
    rows: int,
    *,
    version: float | None = 3.0,
    spelling: str = "new",
    args: Namespace | None = None,
) -> Path:
    """Write a checkpoint of iteration 10, ordered as its version has it, and return its root."""
    heads = model.spec.num_attention_heads // tp
    models: dict[str, dict[str, dict[str, object]]] = {}
    for name, chunks in rank_states(model, tp, stages, rows).items():
        for key, arrays in chunks.items():
            tensors = {n: torch_of(array) for n, array in arrays.items()}
            for n in tensors:
                if "query_key_value" in n and (version or 0) < 2:
                    tensors[n] = legacy.fused(tensors[n], heads, version)
            models.setdefault(name, {})[key] = dict(tensors)
    said = args or legacy_args(model, tp, stages, rows)
    legacy.write(root, said, models, version=version, spelling=spelling)
    return finished(root, root / "iter_0000010", model)
