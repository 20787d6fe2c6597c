"""The canonical vocabulary: messages, keys, shapes.

Names are those of Megatron's converter (NVIDIA/Megatron-LM tools/checkpoint/loader_base.py @
core_v0.12.3), extended where it has none. Tensors are full: never cut by tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.tensors.lazy import LazyTensor

LAYER = "transformer layer "
"""Layer messages are ``"transformer layer 0"``, ``"transformer layer 1"``, ..."""
VISION_LAYER = "vit transformer layer "
"""Those of a vision tower are ``"vit transformer layer 0"``, ..."""
VISION = ("vit ", "vision ")
"""How the names of messages begin that are of a vision tower or of its projection."""
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
    "two": "2",
    "token types": "rows of the token types' embedding, 2 in Megatron",
    "two hidden": "2 * hidden_size",
    "three hidden": "3 * hidden_size",
    "query": "num_attention_heads * (qk_head_dim + qk_pos_emb_head_dim)",
    "query rank": "q_lora_rank",
    "latent": "kv_lora_rank + qk_pos_emb_head_dim",
    "latent rank": "kv_lora_rank",
    "key value": "num_attention_heads * (qk_head_dim + kv_channels)",
    "channels": "3, those of an image",
    "patch": "height and width of a patch of an image",
    "patch values": "channels * patch * patch",
    "class tokens": "tokens before those of the patches",
    "features": "what the projection takes: hidden_size of the vision tower, or a multiple",
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
        Key("tokentype embeddings", ("token types", "hidden"), None, "which sentence, in BERT"),
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
    "output layer": (
        Key("weight", ("vocab", "hidden"), 0, "output projection, absent when tied"),
        Key("bias", ("vocab",), 0, "its bias, in BERT"),
    ),
    "pooler": (
        Key("weight", ("hidden", "hidden"), None, "projection of BERT's first token"),
        Key("bias", _NORM, None, "its bias"),
    ),
    "lm head": (
        Key("dense weight", ("hidden", "hidden"), None, "projection before BERT's output layer"),
        Key("dense bias", _NORM, None, "its bias"),
        Key("norm weight", _NORM, None, "norm before the output layer"),
        Key("norm bias", _NORM, None, "its bias"),
    ),
    "binary head": (
        Key("weight", ("two", "hidden"), None, "whether the second sentence follows the first"),
        Key("bias", ("two",), None, "its bias"),
    ),
    "vit embeddings": (
        Key("conv1 weight", ("hidden", "channels", "patch", "patch"), None, "of every patch"),
        Key("conv1 bias", _NORM, None, "its bias"),
        Key("embedder weight", ("hidden", "patch values"), 0, "of every patch, in RADIO"),
        Key("embedder bias", _NORM, 0, "its bias"),
        Key("position embeddings", ("positions", "hidden"), None, "learned positions"),
        Key("class token", ("one", "class tokens", "hidden"), None, "before the patches"),
        Key("mask token", ("one", "hidden"), None, "in place of a patch"),
        Key("ln pre weight", _NORM, None, "norm before the first layer"),
        Key("ln pre bias", _NORM, None, "its bias"),
        Key("ln post weight", _NORM, None, "norm after the last layer"),
        Key("ln post bias", _NORM, None, "its bias"),
    ),
    "vit transformer layer N": (
        Key("input norm weight", _NORM, None, "norm before attention"),
        Key("input norm bias", _NORM, None, "its bias"),
        Key("qkv weight", ("qkv", "hidden"), 0, "query, key, value, fused head by head"),
        Key("qkv bias", ("qkv",), 0, "its bias, in the same order"),
        Key("q norm weight", ("heads",), 0, "norm of the whole query, in InternViT"),
        Key("k norm weight", ("heads",), 0, "norm of the whole key, in InternViT"),
        Key("dense weight", ("hidden", "heads"), 1, "output projection of attention"),
        Key("dense bias", ("hidden",), None, "its bias"),
        Key("ls1", _NORM, None, "scale of attention's output"),
        Key("pre mlp norm weight", _NORM, None, "norm before the MLP"),
        Key("pre mlp norm bias", _NORM, None, "its bias"),
        Key("mlp l0 weight W", ("ffn", "hidden"), 0, "gate projection of a gated MLP"),
        Key("mlp l0 weight V", ("ffn", "hidden"), 0, "up projection of a gated MLP"),
        Key("mlp l0 bias W", ("ffn",), 0, "bias of the gate"),
        Key("mlp l0 bias V", ("ffn",), 0, "bias of the up projection"),
        Key("mlp l0 weight", ("ffn", "hidden"), 0, "first projection of a plain MLP"),
        Key("mlp l0 bias", ("ffn",), 0, "its bias"),
        Key("mlp l1 weight", ("hidden", "ffn"), 1, "down projection"),
        Key("mlp l1 bias", ("hidden",), None, "its bias"),
        Key("ls2", _NORM, None, "scale of the MLP's output"),
    ),
    "vit head": (
        Key("probe", ("one", "one", "hidden"), None, "query of SigLIP's pooling"),
        Key("qkv weight", ("three hidden", "hidden"), None, "all of query, then key, then value"),
        Key("qkv bias", ("three hidden",), None, "its bias"),
        Key("dense weight", ("hidden", "hidden"), None, "output projection of the pooling"),
        Key("dense bias", _NORM, None, "its bias"),
        Key("norm weight", _NORM, None, "norm before the MLP"),
        Key("norm bias", _NORM, None, "its bias"),
        Key("mlp l0 weight", ("ffn", "hidden"), None, "first projection"),
        Key("mlp l0 bias", ("ffn",), None, "its bias"),
        Key("mlp l1 weight", ("hidden", "ffn"), None, "down projection"),
        Key("mlp l1 bias", _NORM, None, "its bias"),
    ),
    "vision projection": (
        Key("vision projection norm weight", ("features",), None, "norm before the projection"),
        Key("vision projection norm bias", ("features",), None, "its bias"),
        Key("vision projection l0 weight", ("ffn", "features"), 0, "first, or only, projection"),
        Key("vision projection l0 bias", ("ffn",), 0, "its bias"),
        Key("vision projection l1 weight", ("hidden", "ffn"), 1, "second projection"),
        Key("vision projection l1 bias", ("hidden",), None, "its bias"),
    ),
}
"""Keys by message; ``N`` is the global layer number, or that of a layer for further tokens."""

EXPERTS = (
    Key("mlp l0 weight W", ("experts", "moe ffn", "hidden"), 1, "gate projections of all experts"),
    Key("mlp l0 weight V", ("experts", "moe ffn", "hidden"), 1, "up projections of all experts"),
    Key("mlp l1 weight", ("experts", "hidden", "moe ffn"), 2, "down projections of all experts"),
)
"""Keys of a layer that mean something else in a mixture of experts."""

RADIO = (
    Key("position embeddings", ("one", "positions", "hidden"), None, "learned positions"),
    Key("class token", ("class tokens", "hidden"), None, "before the patches"),
)
"""Keys of a vision tower's embeddings that have another shape in RADIO."""

_KEYS = {
    message.removesuffix("N"): {key.name: key for key in keys} for message, keys in MESSAGES.items()
}
_EXPERT_KEYS = {key.name: key for key in EXPERTS}
_RADIO_KEYS = {key.name: key for key in RADIO}


RADIO_CLASS = "RADIOViTModel"
"""The class of RADIO's vision towers, which have keys of their own."""


def keys_of(message: str, spec: ModelSpec | None = None) -> Mapping[str, Key]:
    """Return the keys that a message may have, by name; none for an unknown message.

    With a ``spec`` those of a layer are of the kind that this layer is.
    """
    kinds = (LAYER, VISION_LAYER, MTP_LAYER)
    numbered = next((kind for kind in kinds if message.startswith(kind)), message)
    known = _KEYS.get(numbered, {})
    if spec is not None and spec.is_moe(position_of(message, spec)):
        known = {**known, **_EXPERT_KEYS}
    if spec is not None and message == "vit embeddings" and spec.architecture == RADIO_CLASS:
        known = {**known, **_RADIO_KEYS}
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
        "two": 2,
        "token types": spec.extra.get("type_vocab_size") or 0,
        "two hidden": 2 * spec.hidden_size,
        "three hidden": 3 * spec.hidden_size,
        "query": spec.num_attention_heads * (spec.qk_head_dim + spec.qk_pos_emb_head_dim),
        "query rank": spec.q_lora_rank or 0,
        "latent": spec.kv_lora_rank + spec.qk_pos_emb_head_dim,
        "latent rank": spec.kv_lora_rank,
        "key value": spec.num_attention_heads * (spec.qk_head_dim + spec.kv_channels),
        "channels": 3,
        **_of_images(spec),
    }


def _of_images(spec: ModelSpec) -> dict[str, int]:
    """Return the symbols of a vision tower or a projection, as far as its spec says them."""
    extra = spec.extra
    said = {"features": extra.get("input_size"), "class tokens": extra.get("class_tokens")}
    if patch := extra.get("patch_size"):
        said |= {"patch": patch, "patch values": 3 * patch * patch}
    return {name: value for name, value in said.items() if value is not None}


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
