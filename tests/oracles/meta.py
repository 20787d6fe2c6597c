"""Meta's own Llama in eager torch, run as its processes run it: every shard computes its share.

Nothing is joined but activations, as fairscale joins them: outputs of column-parallel layers side
by side, those of row-parallel layers by addition. So this reads shards by another road than any
converter. Queries and keys rotate as complex numbers, neighbours together.

Mistral's model has the same names and computes the same, but for heads and feed-forward sizes of
its own and a sliding window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

Weights = dict[str, torch.Tensor]

# Axis that model parallelism cuts; -1 for what every shard has whole.
_AXES = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "norm": -1,
    "attention_norm": -1,
    "ffn_norm": -1,
}


def hidden_dim(params: Mapping[str, Any]) -> int:
    """Rows of w1 and w3."""
    if "hidden_dim" in params:
        return params["hidden_dim"]
    size = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    multiple = params["multiple_of"]
    return multiple * ((size + multiple - 1) // multiple)


def weights(params: Mapping[str, Any], vocabulary: int, *, seed: int = 0) -> Weights:
    """Random weights of a whole model, float32."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden = params["dim"], hidden_dim(params)
    head = params.get("head_dim") or dim // params["n_heads"]
    query, key = params["n_heads"] * head, (params.get("n_kv_heads") or params["n_heads"]) * head
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (vocabulary, dim),
        "norm.weight": (dim,),
        "output.weight": (vocabulary, dim),
    }
    for layer in range(params["n_layers"]):
        for name, shape in {
            "attention.wq": (query, dim),
            "attention.wk": (key, dim),
            "attention.wv": (key, dim),
            "attention.wo": (dim, query),
            "feed_forward.w1": (hidden, dim),
            "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        found[name] = 1 + values * 0.1 if len(shape) == 1 else values * 0.05
    return found


def write(
    directory: Path,
    params: Mapping[str, Any],
    whole: Weights,
    *,
    shards: int = 1,
    by_width: bool = False,
) -> Path:
    """Write ``params.json`` and ``consolidated.NN.pth``, with the buffer that old releases have."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    for rank in range(shards):
        part = {}
        for name, tensor in whole.items():
            short = name.split(".")[-2]
            axis = int(by_width) if short == "tok_embeddings" else _AXES[short]
            part[name] = tensor if axis < 0 else tensor.chunk(shards, axis)[rank].clone()
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    return directory


def write_mistral(directory: Path, params: Mapping[str, Any], whole: Weights) -> Path:
    """Write ``params.json`` and ``consolidated.safetensors``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    save_file(whole, directory / "consolidated.safetensors")
    return directory


def read(directory: Path) -> tuple[dict[str, Any], list[Weights]]:
    """The params and the shards of a directory, by torch or safetensors themselves."""
    params = json.loads((directory / "params.json").read_text())
    single = directory / "consolidated.safetensors"
    if single.exists():
        return params, [load_file(single)]
    files = sorted(directory.glob("consolidated.*.pth"))
    return params, [torch.load(file, weights_only=True) for file in files]


def logits(directory: Path, tokens: torch.Tensor, *, theta: float = 10000.0) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in float32; ``theta`` is the code's default."""
    params, shards = read(directory)
    shards = [{name: tensor.float() for name, tensor in shard.items()} for shard in shards]
    count, dim, heads = len(shards), params["dim"], params["n_heads"]
    head = params.get("head_dim") or dim // heads
    groups = params.get("n_kv_heads") or heads
    assert not groups % count  # Meta's model has groups // count of them in a process
    unused = [set(shard) - {"rope.freqs"} for shard in shards]

    def take(name: str, shape: Sequence[int]) -> list[torch.Tensor]:
        for shard, rest in zip(shards, unused, strict=True):
            assert shard[name].shape == torch.Size(shape), name
            rest.remove(name)
        return [shard[name] for shard in shards]

    rows = shards[0]["output.weight"].shape[0]
    assert params["vocab_size"] in (-1, rows * count)
    x = _embed(shards, tokens, dim)
    for rest in unused:
        rest.remove("tok_embeddings.weight")
    rotations = _rotations(params, head, tokens.shape[1], theta)
    mask = _mask(tokens.shape[1], params.get("sliding_window"))
    hidden = hidden_dim(params) // count
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        norm = take(f"{prefix}attention_norm.weight", [dim])
        attention = [
            _attention(_norm(x, scale, params["norm_eps"]), *parts, head, rotations, mask)
            for scale, *parts in zip(
                norm,
                take(f"{prefix}attention.wq.weight", [heads // count * head, dim]),
                take(f"{prefix}attention.wk.weight", [groups // count * head, dim]),
                take(f"{prefix}attention.wv.weight", [groups // count * head, dim]),
                take(f"{prefix}attention.wo.weight", [dim, heads // count * head]),
                strict=True,
            )
        ]
        x = x + sum(attention)
        norm = take(f"{prefix}ffn_norm.weight", [dim])
        forward = [
            (silu(y @ w1.T) * (y @ w3.T)) @ w2.T
            for scale, w1, w2, w3 in zip(
                norm,
                take(f"{prefix}feed_forward.w1.weight", [hidden, dim]),
                take(f"{prefix}feed_forward.w2.weight", [dim, hidden]),
                take(f"{prefix}feed_forward.w3.weight", [hidden, dim]),
                strict=True,
            )
            for y in [_norm(x, scale, params["norm_eps"])]
        ]
        x = x + sum(forward)
    scale = take("norm.weight", [dim])
    output = take("output.weight", [rows, dim])
    found = [_norm(x, s, params["norm_eps"]) @ w.T for s, w in zip(scale, output, strict=True)]
    assert not any(unused), unused
    return torch.cat(found, dim=-1)


def _embed(shards: Sequence[Weights], tokens: torch.Tensor, dim: int) -> torch.Tensor:
    """ParallelEmbedding (width, Llama 1 and 2) or VocabParallelEmbedding (vocabulary, Llama 3)."""
    tables = [shard["tok_embeddings.weight"] for shard in shards]
    if len(tables) > 1 and tables[0].shape[1] * len(tables) == dim:
        return torch.cat([table[tokens] for table in tables], dim=-1)
    rows = tables[0].shape[0]
    total = torch.zeros(*tokens.shape, dim)
    for rank, table in enumerate(tables):
        assert table.shape == (rows, dim)
        local = tokens - rank * rows
        inside = (local >= 0) & (local < rows)
        total += table[local.clamp(0, rows - 1)] * inside[..., None]
    return total


def _norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def _attention(x, wq, wk, wv, wo, head, rotations, mask):  # [batch, sequence, dim]
    batch, length, _ = x.shape
    q, k, v = ((x @ w.T).view(batch, length, -1, head) for w in (wq, wk, wv))
    q, k = (_rotate(part, rotations) for part in (q, k))
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (
        part.transpose(1, 2)
        for part in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(head) + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1) @ wo.T


def _rotate(part: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(part.reshape(*part.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rotations[:, None, :]).flatten(-2)


def _rotations(params: Mapping[str, Any], head: int, length: int, theta: float) -> torch.Tensor:
    """Unit complex numbers [sequence, head / 2]; Llama 3.1 stretches the long wavelengths."""
    base = params.get("rope_theta") or theta
    frequencies = 1.0 / base ** (torch.arange(0, head, 2).float() / head)
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor") or 8
        scaled = []
        for frequency in frequencies.tolist():
            turns = 8192 * frequency / (2 * math.pi)  # within the old context
            smooth = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        frequencies = torch.tensor(scaled)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _mask(length: int, window: int | None) -> torch.Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    inside = (distance >= 0) & (distance < (window or length))
    return torch.where(inside, 0.0, -torch.inf)
