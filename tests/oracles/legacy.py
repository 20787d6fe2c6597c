"""Megatron's legacy GPT and BERT models in eager torch, run as its ranks run it, and its files.

Every tensor-parallel rank computes its share from its own file, read by torch.load, in the order
that the file's ``checkpoint_version`` has; nothing is joined but activations. So weights come here
by another road than any converter's. Files are written the other way round, in any version's order
and in the spellings of three ages.

The model is that of NVIDIA/Megatron-LM megatron/legacy/model/{language_model,transformer}.py @
core_v0.12.3, with rotary embeddings whose base the model has fixed; it was compared with the
original on CPU.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .bert import token_types

Weights = dict[str, torch.Tensor]
Tree = dict[str, Any]

ROTARY_BASE = 10000.0
TRACKER = "latest_checkpointed_iteration.txt"


def fused(rows: torch.Tensor, heads: int, version: float | None) -> torch.Tensor:
    """Query, key and value of a shard's heads, [heads, 3, size, ...], in a version's order."""
    rest = rows.shape[1:]
    whole = rows.reshape(heads, 3, -1, *rest)
    if not version:
        whole = whole.transpose(0, 1)
    elif version == 1:
        whole = whole.transpose(1, 2)
    return whole.reshape(rows.shape).contiguous()


def unfused(rows: torch.Tensor, args: Namespace, tp: int, version: float) -> list[torch.Tensor]:
    """Query, key and value, [heads, size, ...] each, of one rank's shard."""
    heads, size = args.num_attention_heads // tp, args.kv_channels
    rest = rows.shape[1:]
    if version == 0:
        return list(rows.reshape(3, heads, size, *rest))
    if version == 1:
        return list(rows.reshape(heads, size, 3, *rest).movedim(2, 0))
    grouped = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    groups = grouped // tp
    parts = rows.reshape(groups, heads // groups + 2, size, *rest)
    query, key, value = parts.split([heads // groups, 1, 1], dim=1)
    return [part.reshape(-1, size, *rest) for part in (query, key, value)]


def old_spelling(named: Mapping[str, Any]) -> Tree:
    """A rank's ``model`` as it was before the modules got their present names."""
    tree: Tree = {"embedding": {}, "transformer": {}}
    for name, value in named.items():
        part, _, rest = name.removeprefix("language_model.").partition(".")
        if part == "embedding":
            table, _, weight = rest.partition(".")
            tree["embedding"].setdefault(table, {})[weight] = value
        elif part == "encoder":
            rest = rest.replace("self_attention", "attention").replace(
                "input_norm", "input_layernorm"
            )
            rest = rest.replace("post_attention_norm", "post_attention_layernorm")
            tree["transformer"][rest.replace("final_norm", "final_layernorm")] = value
        elif part == "output_layer":
            tree.setdefault("output_layer", {})[rest] = value
    head = "word_embeddings_for_head"
    top = {head: {"weight": named[f"{head}.weight"]}} if f"{head}.weight" in named else {}
    return {"language_model": tree, **top}


def oldest_spelling(named: Mapping[str, Any]) -> Tree:
    """A rank's ``model`` with a flat language model: tables and layers by dotted names."""
    old = old_spelling(named)
    model = old["language_model"]
    flat = {f"{table}.weight": value["weight"] for table, value in model["embedding"].items()}
    flat |= {f"transformer.{name}": value for name, value in model["transformer"].items()}
    if "output_layer" in model:
        flat["output_layer"] = model["output_layer"]
    return {**old, "language_model": flat}


def new_spelling(named: Mapping[str, Any]) -> Tree:
    """A rank's ``model`` as Megatron writes it today, with the states of its linear layers."""
    tree: Tree = {"language_model": {"encoder": {}}}
    for name, value in named.items():
        if name.startswith("language_model.encoder."):
            tree["language_model"]["encoder"][name.removeprefix("language_model.encoder.")] = value
            continue
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    for name in list(tree["language_model"]["encoder"]):
        if name.endswith("query_key_value.weight"):
            state = name.removesuffix("weight") + "_extra_state"
            tree["language_model"]["encoder"][state] = None
    return tree


SPELLINGS = {"new": new_spelling, "old": old_spelling, "oldest": oldest_spelling}


def write(
    root: Path,
    args: Namespace | None,
    models: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    version: float | None = 3.0,
    spelling: str = "new",
) -> Path:
    """Write what each directory's file holds, ``model`` or ``model0`` ... by name; return the root.

    Files lack what is None.
    """
    directory = root / "iter_0000010"
    for name, chunks in models.items():
        state: Tree = {"iteration": 10}
        state |= {} if args is None else {"args": args}
        state |= {} if version is None else {"checkpoint_version": version}
        state |= {key: SPELLINGS[spelling](named) for key, named in chunks.items()}
        (directory / name).mkdir(parents=True)
        torch.save(state, directory / name / "model_optim_rng.pt")
    (root / TRACKER).write_text("10")
    return root


def read(root: Path) -> tuple[Namespace, list[list[Weights]], float]:
    """The args, the weights by chunk in order of execution and by rank, and the version.

    Files are in today's spelling, as checkpoints that are written are.
    """
    (directory,) = [path for path in root.iterdir() if path.is_dir()]
    states = {
        path.parent.name: torch.load(path, weights_only=False)
        for path in sorted(directory.glob("mp_rank_*/model_optim_rng.pt"))
    }
    args = next(iter(states.values()))["args"]
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    keys = sorted(key for key in next(iter(states.values())) if key.startswith("model"))
    chunks = [
        [
            flat(states[f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")][key])
            for rank in range(tp)
        ]
        for key in keys
        for stage in range(pp)
    ]
    return args, chunks, next(iter(states.values())).get("checkpoint_version", 0)


def flat(tree: Tree, prefix: str = "") -> Weights:
    """The tensors of a tree by their path."""
    found: Weights = {}
    for name, entry in tree.items():
        if isinstance(entry, dict):
            found |= flat(entry, f"{prefix}{name}.")
        elif entry is not None:
            found[f"{prefix}{name}"] = entry
    return found


def logits(root: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the model in these files computes, [batch, sequence, padded vocabulary]."""
    args, chunks, version = read(root)
    bert = "lm_head.dense.weight" in chunks[-1][0]
    hidden = _embedded(chunks[0], args, tokens, bert)
    for ranks in chunks:
        layer = 0
        while f"language_model.encoder.layers.{layer}.input_norm.weight" in ranks[0]:
            prefix = f"language_model.encoder.layers.{layer}."
            own = [
                {n.removeprefix(prefix): w for n, w in rank.items() if n.startswith(prefix)}
                for rank in ranks
            ]
            hidden = _layer(own, args, version, hidden, causal=not bert)
            layer += 1
    last = chunks[-1]
    hidden = _norm(hidden, last[0], "language_model.encoder.final_norm", args)
    names = ("language_model.output_layer.weight", "word_embeddings_for_head.weight")
    words = "language_model.embedding.word_embeddings.weight"
    name = next(name for name in (*names, words) if name in last[0])
    if bert:
        return _bert_logits(last, name, hidden, args)
    return torch.cat([hidden @ rank[name].T for rank in last], -1)


def _bert_logits(
    ranks: Sequence[Weights], words: str, hidden: torch.Tensor, args: Namespace
) -> torch.Tensor:
    """Logits of tokens, and behind them of every one those of the binary head."""
    first = ranks[0]
    head = functional.linear(hidden, first["lm_head.dense.weight"], first["lm_head.dense.bias"])
    head = functional.gelu(head, approximate="tanh" if args.openai_gelu else "none")
    head = _norm(head, first, "lm_head.norm", args)
    logits = torch.cat([head @ rank[words].T + rank["lm_head.bias"] for rank in ranks], -1)
    if "binary_head.weight" not in first:
        return logits
    pooler = (first[f"language_model.pooler.dense.{kind}"] for kind in ("weight", "bias"))
    pooled = functional.linear(hidden[:, 0], *pooler).tanh()
    binary = functional.linear(pooled, first["binary_head.weight"], first["binary_head.bias"])
    return torch.cat([logits, binary[:, None].expand(-1, logits.shape[1], -1)], -1)


def _embedded(
    ranks: Sequence[Weights], args: Namespace, tokens: torch.Tensor, bert: bool
) -> torch.Tensor:
    table = torch.cat([rank["language_model.embedding.word_embeddings.weight"] for rank in ranks])
    hidden = table[tokens]
    if args.position_embedding_type == "learned_absolute":
        positions = ranks[0]["language_model.embedding.position_embeddings.weight"]
        hidden = hidden + positions[: tokens.shape[1]]
    types = "language_model.embedding.tokentype_embeddings.weight"
    if bert and types in ranks[0]:
        hidden = hidden + ranks[0][types][token_types(tokens)]
    return hidden


def _norm(hidden: torch.Tensor, weights: Weights, name: str, args: Namespace) -> torch.Tensor:
    weight, size = weights[f"{name}.weight"], hidden.shape[-1:]
    if args.normalization == "LayerNorm":
        return functional.layer_norm(
            hidden, size, weight, weights[f"{name}.bias"], args.norm_epsilon
        )
    return functional.rms_norm(hidden, size, weight, args.norm_epsilon)


def _layer(
    ranks: Sequence[Weights],
    args: Namespace,
    version: float,
    hidden: torch.Tensor,
    *,
    causal: bool,
) -> torch.Tensor:
    normed = _norm(hidden, ranks[0], "input_norm", args)
    hidden = hidden + sum(
        _attention(rank, args, len(ranks), version, normed, causal=causal) for rank in ranks
    )
    hidden = hidden + ranks[0].get("self_attention.dense.bias", 0)
    normed = _norm(hidden, ranks[0], "post_attention_norm", args)
    hidden = hidden + sum(_mlp(rank, args, normed) for rank in ranks)
    return hidden + ranks[0].get("mlp.dense_4h_to_h.bias", 0)


def _attention(
    rank: Weights,
    args: Namespace,
    tp: int,
    version: float,
    hidden: torch.Tensor,
    *,
    causal: bool,
) -> torch.Tensor:
    name = "self_attention.query_key_value."
    parts = unfused(rank[f"{name}weight"], args, tp, version)
    projected = [torch.einsum("bsh,ndh->bnsd", hidden, part) for part in parts]
    if f"{name}bias" in rank:
        biases = unfused(rank[f"{name}bias"], args, tp, version)
        projected = [p + bias[:, None] for p, bias in zip(projected, biases, strict=True)]
    query, key, value = projected
    if args.position_embedding_type == "rope":
        query, key = (_rotated(part, args) for part in (query, key))
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(args.kv_channels)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
    context = scores.softmax(-1) @ value
    return context.transpose(1, 2).flatten(2) @ rank["self_attention.dense.weight"].T


def _rotated(heads: torch.Tensor, args: Namespace) -> torch.Tensor:
    size = int(args.kv_channels * args.rotary_percent)
    turning, still = heads.split([size, args.kv_channels - size], -1)
    angles = torch.outer(
        torch.arange(heads.shape[2], dtype=torch.float32),
        ROTARY_BASE ** (-torch.arange(0, size, 2) / size),
    )
    first, second = turning.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)


def _mlp(rank: Weights, args: Namespace, hidden: torch.Tensor) -> torch.Tensor:
    inner = hidden @ rank["mlp.dense_h_to_4h.weight"].T + rank.get("mlp.dense_h_to_4h.bias", 0)
    if args.swiglu:
        gate, up = inner.chunk(2, -1)
        inner = functional.silu(gate) * up
    else:
        tanh = args.bias_gelu_fusion or args.openai_gelu
        inner = functional.gelu(inner, approximate="tanh" if tanh else "none")
    return inner @ rank["mlp.dense_4h_to_h.weight"].T
