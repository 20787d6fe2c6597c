"""The canonical vocabulary: messages, keys, shapes.

Names are those of Megatron's converter (NVIDIA/Megatron-LM tools/checkpoint/loader_base.py @
core_v0.12.3), extended where it has none. Tensors are full: never cut by tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptx.errors import SchemaError
from ckptx.lazy import LazyTensor
from ckptx.spec import ModelSpec

LAYER = "transformer layer "
"""Layer messages are ``"transformer layer 0"``, ``"transformer layer 1"``, ..."""
MTP_LAYER = "mtp layer "
"""Messages of the layers for multi-token prediction, which Megatron's converter does not know."""


@dataclass(frozen=True, slots=True)
class Key:
    """A canonical tensor: symbolic shape, the axis that tensor parallelism cuts, first protocol."""

    name: str
    shape: tuple[str, ...]
    tp: int | None
    meaning: str
    since: int = 1
    pinned: bool = False
    """Kept in its own dtype whatever ``--dtype`` says."""


SYMBOLS = {
    "vocab": "rows of the embedding, padding included",
    "positions": "max_position_embeddings",
    "hidden": "hidden_size",
    "qkv": "(num_attention_heads + 2 * num_query_groups) * kv_channels",
    "heads": "num_attention_heads * kv_channels",
    "head": "kv_channels",
    "groups": "num_query_groups * kv_channels",
    "ffn": "ffn_hidden_size",
    "experts": "num_experts",
    "moe ffn": "moe_ffn_hidden_size",
    "shared": "moe_shared_expert_intermediate_size",
    "one": "1",
    "two hidden": "2 * hidden_size",
    "query": "num_attention_heads * (qk_head_dim + qk_pos_emb_head_dim)",
    "query rank": "q_lora_rank",
    "latent": "kv_lora_rank + qk_pos_emb_head_dim",
    "latent rank": "kv_lora_rank",
    "key value": "num_attention_heads * (qk_head_dim + kv_channels)",
}
"""What the symbols in shapes stand for."""

_NORM = ("hidden",)

_LAYER = (
    Key("input norm weight", _NORM, None, "norm before attention"),
    Key("input norm bias", _NORM, None, "its bias"),
    Key("qkv weight", ("qkv", "hidden"), 0, "query, key, value, fused group by group"),
    Key("qkv bias", ("qkv",), 0, "its bias, in the same order"),
    Key("q norm weight", ("head",), None, "norm of every query head", since=1),
    Key("k norm weight", ("head",), None, "norm of every key head", since=1),
    Key("q projection weight", ("query", "hidden"), 0, "query of latent attention, no rank"),
    Key("q down weight", ("query rank", "hidden"), None, "hidden state to latent query"),
    Key("q down norm weight", ("query rank",), None, "norm of the latent query"),
    Key("q up weight", ("query", "query rank"), 0, "latent query to heads"),
    Key("kv down weight", ("latent", "hidden"), None, "to latent key and value, rotary key last"),
    Key("kv down norm weight", ("latent rank",), None, "norm of the latent key and value"),
    Key("kv up weight", ("key value", "latent rank"), 0, "latent to key and value, head by head"),
    Key("dense weight", ("hidden", "heads"), 1, "output projection of attention"),
    Key("dense bias", ("hidden",), None, "its bias"),
    Key("post norm weight", _NORM, None, "norm before the MLP"),
    Key("post norm bias", _NORM, None, "its bias"),
    Key("mlp l0 weight W", ("ffn", "hidden"), 0, "gate projection of a gated MLP"),
    Key("mlp l0 weight V", ("ffn", "hidden"), 0, "up projection of a gated MLP"),
    Key("mlp l0 bias W", ("ffn",), 0, "bias of the gate"),
    Key("mlp l0 bias V", ("ffn",), 0, "bias of the up projection"),
    Key("mlp l0 weight", ("ffn", "hidden"), 0, "first projection of a plain MLP"),
    Key("mlp l0 bias", ("ffn",), 0, "its bias"),
    Key("mlp l1 weight", ("hidden", "ffn"), 1, "down projection"),
    Key("mlp l1 bias", ("hidden",), None, "its bias"),
    Key("q projection norm weight", ("heads",), None, "norm of the whole query"),
    Key("k projection norm weight", ("groups",), None, "norm of the whole key"),
    Key("attention output norm weight", _NORM, None, "norm after attention, before adding"),
    Key("mlp output norm weight", _NORM, None, "norm after the MLP, before adding"),
    Key("router weight", ("experts", "hidden"), None, "router of a mixture of experts"),
    Key("router expert bias", ("experts",), None, "its balancing bias", pinned=True),
    Key("shared gate weight", ("one", "hidden"), None, "gate of the shared expert"),
    Key("shared mlp l0 weight W", ("shared", "hidden"), 0, "its gate projection"),
    Key("shared mlp l0 weight V", ("shared", "hidden"), 0, "its up projection"),
    Key("shared mlp l1 weight", ("hidden", "shared"), 1, "its down projection"),
)

MESSAGES: Mapping[str, tuple[Key, ...]] = {
    "embeddings": (
        Key("word embeddings", ("vocab", "hidden"), 0, "token embeddings"),
        Key("position embeddings", ("positions", "hidden"), None, "learned positions"),
    ),
    "transformer layer N": _LAYER,
    "mtp layer N": (
        Key("embedding norm weight", _NORM, None, "norm of the next token's embedding"),
        Key("embedding norm bias", _NORM, None, "its bias"),
        Key("hidden norm weight", _NORM, None, "norm of the hidden state"),
        Key("hidden norm bias", _NORM, None, "its bias"),
        Key("projection weight", ("hidden", "two hidden"), 0, "of embedding and hidden state"),
        *_LAYER,
        Key("final norm weight", _NORM, None, "norm before the output layer"),
        Key("final norm bias", _NORM, None, "its bias"),
    ),
    "final norm": (
        Key("weight", _NORM, None, "norm after the last layer"),
        Key("bias", _NORM, None, "its bias"),
    ),
    "output layer": (Key("weight", ("vocab", "hidden"), 0, "output projection, absent when tied"),),
}
"""Keys by message; ``N`` is the global layer number, or that of a layer for further tokens."""

EXPERTS = (
    Key("mlp l0 weight W", ("experts", "moe ffn", "hidden"), 1, "gate projections of all experts"),
    Key("mlp l0 weight V", ("experts", "moe ffn", "hidden"), 1, "up projections of all experts"),
    Key("mlp l1 weight", ("experts", "hidden", "moe ffn"), 2, "down projections of all experts"),
)
"""Keys of a layer that mean something else in a mixture of experts."""

_KEYS = {
    message.removesuffix("N"): {key.name: key for key in keys} for message, keys in MESSAGES.items()
}
_EXPERT_KEYS = {key.name: key for key in EXPERTS}


def keys_of(message: str, spec: ModelSpec | None = None) -> Mapping[str, Key]:
    """Return the keys that a message may have, by name; none for an unknown message.

    With a ``spec`` those of a layer are of the kind that this layer is.
    """
    numbered = next((kind for kind in (LAYER, MTP_LAYER) if message.startswith(kind)), message)
    known = _KEYS.get(numbered, {})
    if spec is not None and spec.is_moe(position_of(message, spec)):
        known = {**known, **_EXPERT_KEYS}
    return known


def layer_of(message: str) -> int | None:
    """Return the number of the layer that a message is about, None for any other message."""
    number = message.removeprefix(LAYER)
    return int(number) if number != message and number.isdigit() else None


def position_of(message: str, spec: ModelSpec) -> int | None:
    """Return the place of a message's layer in the model; multi-token prediction comes last."""
    further = message.removeprefix(MTP_LAYER)
    if further != message and further.isdigit():
        return spec.num_layers + int(further)
    return layer_of(message)


def dimensions(spec: ModelSpec) -> dict[str, int]:
    """Return the value of every symbol that a spec determines."""
    return {
        "positions": spec.max_position_embeddings,
        "hidden": spec.hidden_size,
        "qkv": spec.qkv_rows,
        "heads": spec.num_attention_heads * spec.kv_channels,
        "head": spec.kv_channels,
        "groups": spec.num_query_groups * spec.kv_channels,
        "ffn": spec.ffn_hidden_size,
        "experts": spec.num_experts or 0,
        "moe ffn": spec.moe_ffn_hidden_size or 0,
        "shared": spec.moe_shared_expert_intermediate_size or 0,
        "one": 1,
        "two hidden": 2 * spec.hidden_size,
        "query": spec.num_attention_heads * (spec.qk_head_dim + spec.qk_pos_emb_head_dim),
        "query rank": spec.q_lora_rank or 0,
        "latent": spec.kv_lora_rank + spec.qk_pos_emb_head_dim,
        "latent rank": spec.kv_lora_rank,
        "key value": spec.num_attention_heads * (spec.qk_head_dim + spec.kv_channels),
    }


def check_shapes(message: str, tensors: Mapping[str, LazyTensor], spec: ModelSpec) -> None:
    """Raise a SchemaError if a canonical tensor has not the shape that the spec gives it."""
    values = dimensions(spec)
    known = keys_of(message, spec)
    for name, tensor in tensors.items():
        key = known.get(name)
        if key is None:
            raise SchemaError(f"message {message!r}: {name!r} is not in the vocabulary")
        expected = tuple(values.get(symbol, -1) for symbol in key.shape)
        fits = len(expected) == len(tensor.shape) and all(
            want in (-1, found) for want, found in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            wanted = [symbol if n < 0 else n for symbol, n in zip(key.shape, expected, strict=True)]
            raise SchemaError(
                f"{message}: {name!r} is {list(tensor.shape)}, the model's dimensions say "
                f"[{', '.join(map(str, wanted))}] ({', '.join(key.shape)}); the config does not "
                "belong to these weights"
            )
