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
"""What the symbols in shapes stand for: an attribute of a `ModelSpec`, or words."""

_NORM = ("hidden",)


def _linear(
    name: str, shape: tuple[str, ...], tp: int | None, meaning: str, bias: str = "its bias"
) -> tuple[Key, Key]:
    """Return the keys of a weight and of its bias, which is as long as the weight has rows."""
    weight = Key(f"{name} weight".strip(), shape, tp, meaning)
    return weight, Key(f"{name} bias".strip(), shape[:1], None if tp else tp, bias)


def _norm(name: str, meaning: str, shape: tuple[str, ...] = _NORM) -> tuple[Key, Key]:
    return _linear(name, shape, None, meaning)


_SAME_ORDER = "its bias, in the same order"
_DENSE = _linear("dense", ("hidden", "heads"), 1, "output projection of attention")
_MLP = (
    Key("mlp l0 weight W", ("ffn", "hidden"), 0, "gate projection of a gated MLP"),
    Key("mlp l0 weight V", ("ffn", "hidden"), 0, "up projection of a gated MLP"),
    Key("mlp l0 bias W", ("ffn",), 0, "bias of the gate"),
    Key("mlp l0 bias V", ("ffn",), 0, "bias of the up projection"),
    *_linear("mlp l0", ("ffn", "hidden"), 0, "first projection of a plain MLP"),
    *_linear("mlp l1", ("hidden", "ffn"), 1, "down projection"),
)
_LAYER = (
    *_norm("input norm", "norm before attention"),
    *_linear("qkv", ("qkv", "hidden"), 0, "query, key, value, fused group by group", _SAME_ORDER),
    Key("q norm weight", ("head",), None, "norm of every query head"),
    Key("k norm weight", ("head",), None, "norm of every key head"),
    Key("q projection weight", ("query", "hidden"), 0, "query of latent attention, no rank"),
    Key("q down weight", ("query rank", "hidden"), None, "hidden state to latent query"),
    Key("q down norm weight", ("query rank",), None, "norm of the latent query"),
    Key("q up weight", ("query", "query rank"), 0, "latent query to heads"),
    Key("kv down weight", ("latent", "hidden"), None, "to latent key and value, rotary key last"),
    Key("kv down norm weight", ("latent rank",), None, "norm of the latent key and value"),
    Key("kv up weight", ("key value", "latent rank"), 0, "latent to key and value, head by head"),
    *_DENSE,
    *_norm("post norm", "norm before the MLP"),
    *_MLP,
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
_SQUARE = ("hidden", "hidden")

MESSAGES: Mapping[str, tuple[Key, ...]] = {
    "embeddings": (
        Key("word embeddings", ("vocab", "hidden"), 0, "token embeddings"),
        Key("position embeddings", ("positions", "hidden"), None, "learned positions"),
        Key("tokentype embeddings", ("token types", "hidden"), None, "which sentence, in BERT"),
    ),
    "transformer layer N": _LAYER,
    "mtp layer N": (
        *_norm("embedding norm", "norm of the next token's embedding"),
        *_norm("hidden norm", "norm of the hidden state"),
        Key("projection weight", ("hidden", "two hidden"), 0, "of embedding and hidden state"),
        *_LAYER,
        *_norm("final norm", "norm before the output layer"),
    ),
    "final norm": _norm("", "norm after the last layer"),
    "output layer": _linear(
        "", ("vocab", "hidden"), 0, "output projection, absent when tied", "its bias, in BERT"
    ),
    "pooler": _linear("", _SQUARE, None, "projection of BERT's first token"),
    "lm head": (
        *_linear("dense", _SQUARE, None, "projection before BERT's output layer"),
        *_norm("norm", "norm before the output layer"),
    ),
    "binary head": _linear(
        "", ("two", "hidden"), None, "whether the second sentence follows the first"
    ),
    "vit embeddings": (
        *_linear("conv1", ("hidden", "channels", "patch", "patch"), None, "of every patch"),
        *_linear("embedder", ("hidden", "patch values"), 0, "of every patch, in RADIO"),
        Key("position embeddings", ("positions", "hidden"), None, "learned positions"),
        Key("class token", ("one", "class tokens", "hidden"), None, "before the patches"),
        Key("mask token", ("one", "hidden"), None, "in place of a patch"),
        *_norm("ln pre", "norm before the first layer"),
        *_norm("ln post", "norm after the last layer"),
    ),
    "vit transformer layer N": (
        *_norm("input norm", "norm before attention"),
        *_linear("qkv", ("qkv", "hidden"), 0, "query, key, value, fused head by head", _SAME_ORDER),
        Key("q norm weight", ("heads",), 0, "norm of the whole query, in InternViT"),
        Key("k norm weight", ("heads",), 0, "norm of the whole key, in InternViT"),
        *_DENSE,
        Key("ls1", _NORM, None, "scale of attention's output"),
        *_norm("pre mlp norm", "norm before the MLP"),
        *_MLP,
        Key("ls2", _NORM, None, "scale of the MLP's output"),
    ),
    "vit head": (
        Key("probe", ("one", "one", "hidden"), None, "query of SigLIP's pooling"),
        *_linear("qkv", ("three hidden", "hidden"), None, "all of query, then key, then value"),
        *_linear("dense", _SQUARE, None, "output projection of the pooling"),
        *_norm("norm", "norm before the MLP"),
        *_linear("mlp l0", ("ffn", "hidden"), None, "first projection"),
        *_linear("mlp l1", ("hidden", "ffn"), None, "down projection"),
    ),
    "vision projection": (
        *_norm("vision projection norm", "norm before the projection", ("features",)),
        *_linear("vision projection l0", ("ffn", "features"), 0, "first, or only, projection"),
        *_linear("vision projection l1", ("hidden", "ffn"), 1, "second projection"),
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
    heads, rotary = spec.num_attention_heads, spec.qk_pos_emb_head_dim
    return {
        **{name: getattr(spec, said) or 0 for name, said in SYMBOLS.items() if hasattr(spec, said)},
        "qkv": spec.qkv_rows,
        "heads": heads * spec.kv_channels,
        "groups": spec.num_query_groups * spec.kv_channels,
        "one": 1,
        "two": 2,
        "token types": spec.extra.get("type_vocab_size") or 0,
        "two hidden": 2 * spec.hidden_size,
        "three hidden": 3 * spec.hidden_size,
        "query": heads * (spec.qk_head_dim + rotary),
        "latent": spec.kv_lora_rank + rotary,
        "key value": heads * (spec.qk_head_dim + spec.kv_channels),
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
