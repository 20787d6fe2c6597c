"""Llama as Meta publishes it, and Mistral after it: names, shards and ``params.json``.

Every shard holds all names; `meta` says along which axis each is cut. Llama 1 and 2 cut the
embedding along its width (``ParallelEmbedding``), Llama 3 along the vocabulary.

`FIELDS` pairs the keys of ``params.json`` that mean the same under another name. What the file
leaves to Meta's code (the size of the feed-forward layer, how the rotary embedding is scaled) has a
pair of functions; what it cannot say at all is refused or said in a remark.

Source: llama/model.py of meta-llama/llama and of meta-llama/llama3, {args,model}.py of
meta-llama/llama-models, {args,transformer}.py of mistralai/mistral-inference, all @ main;
huggingface/transformers src/transformers/models/llama/convert_llama_weights_to_hf.py @ v4.46.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.errors import SchemaError, listing
from ckptx.model.layout import Layout, Rule, rule, sections
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import QKV, ROTARY_PAIRS, compose
from ckptx.schemas.config.traits import Biases
from ckptx.schemas.config.windows import windowed_layers, windows_extra
from ckptx.schemas.conventions.blocks import untied
from ckptx.schemas.megatron_settings.rope_scaling import LLAMA3_CONSTANTS

EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"


LAYER = "layers.{layer}."
ATTENTION = f"{LAYER}attention."


def after_meta(
    name: str, qkv: Rule, output: Rule, *norms: Rule, ignored: str, embedding_axis: int = 0
) -> Layout:
    """Return a layout in Meta's names; ``norms`` are those of query and key.

    Ranks cut the embedding along ``embedding_axis``.
    """
    mlp = f"{LAYER}feed_forward."
    rules = {
        "embeddings": (rule("word embeddings", EMBEDDING, tp=embedding_axis),),
        "transformer layer {layer}": (
            qkv,
            rule("dense weight", f"{ATTENTION}wo.weight", tp=1),
            *norms,
            rule("mlp l0 weight W", f"{mlp}w1.weight", tp=0),
            rule("mlp l1 weight", f"{mlp}w2.weight", tp=1),
            rule("mlp l0 weight V", f"{mlp}w3.weight", tp=0),
            rule("input norm weight", f"{LAYER}attention_norm.weight"),
            rule("post norm weight", f"{LAYER}ffn_norm.weight"),
        ),
        "final norm": (rule("weight", "norm.weight"),),
        "output layer": (output,),
    }
    return Layout(name, sections(rules), tuple(ignored.split()))


_PROJECTIONS = [f"{ATTENTION}w{part}.weight" for part in "qkv"]
_QKV = rule("qkv weight", _PROJECTIONS, compose(QKV, ROTARY_PAIRS), tp=0)
_OUTPUT = rule("weight", OUTPUT, tp=0, when=untied)
META = after_meta("meta/llama", _QKV, _OUTPUT, ignored="rope.freqs")
META_WIDTH = after_meta("meta/llama-width", _QKV, _OUTPUT, ignored="rope.freqs", embedding_axis=1)

FIELDS = (
    ("dim", "hidden_size"),
    ("n_layers", "num_layers"),
    ("n_heads", "num_attention_heads"),
    ("n_kv_heads", "num_query_groups"),
    ("vocab_size", "vocab_size"),
    ("norm_eps", "norm_epsilon"),
    ("rope_theta", "rotary_base"),
)
"""Pairs of a key of ``params.json`` and the spec's attribute."""

MISTRAL_FIELDS = (("head_dim", "kv_channels"), ("hidden_dim", "ffn_hidden_size"))
"""What Mistral says besides, where Llama has a rule."""

_COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of")
_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor")
_UNDERSTOOD = {
    *dict((*FIELDS, *MISTRAL_FIELDS)),
    *(*_COUNTS, *_NUMBERS),
    *("sliding_window", "use_scaled_rope", "rope_high_freq_factor", "max_seq_len"),
}
_RUNTIME = {"max_batch_size", "model_type", "model_parallel_size"}
"""Keys that say how a model is run, not what it is."""

_ESSENTIAL = ("dim", "n_layers", "n_heads", "norm_eps")
_OLD_THETA = 10000.0
_DEFAULT_MULTIPLE = 256

# llama-models llama3/model.py, apply_scaling, has the constants of Megatron. The file says no
# factor; that of Llama 3.2 is known from its two text models, as in transformers' script.
_FACTOR, _FACTOR_OF_32 = 8.0, 32.0
_LLAMA_32_SIZES = {(2048, 16), (3072, 28)}
"""``(dim, n_layers)`` of Llama 3.2 1B and 3B."""

_TIKTOKEN = 65536
"""A vocabulary above it is that of Llama 3: earlier ones have 32,000 to 32,016 words."""

# Pairs that Meta has published, so that its models keep theirs; any that gives the size is right.
_PUBLISHED = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))


def spec_from_params(params: Mapping[str, Any], *, rows: int, ffn: int) -> ModelSpec:
    """Return the dimensions that a ``params.json`` says of shards that hold a model.

    ``rows`` are those of the embedding and ``ffn`` those of the gate, all shards together.

    Raises:
        SchemaError: keys are missing, unknown or no numbers, or contradict the shards.
    """
    said = dict(params)
    _check_keys(said)
    family = "mistral" if "hidden_dim" in said else "llama"
    window = said.get("sliding_window")
    heads, hidden = said["n_heads"], said["dim"]
    if hidden % heads and "head_dim" not in said:
        raise SchemaError(f"params.json: dim {hidden} does not divide over n_heads {heads}")
    if said.get("rope_theta") is None:
        long = family == "mistral" and window is None
        said["rope_theta"] = 1_000_000.0 if long else _OLD_THETA
    vocabulary = said.get("vocab_size")
    values = {
        **{attribute: said.get(key) for key, attribute in FIELDS},
        "num_query_groups": said.get("n_kv_heads") or heads,
        "kv_channels": said.get("head_dim") or hidden // heads,
        "vocab_size": rows if vocabulary in (None, -1) else vocabulary,
        "rotary_base": float(said["rope_theta"]),
    }
    size = said["hidden_dim"] if family == "mistral" else feed_forward_size(said)
    if size != ffn:
        keys = "hidden_dim" if family == "mistral" else "dim, multiple_of and ffn_dim_multiplier"
        raise SchemaError(
            f"params.json contradicts the shards: {keys} give a feed-forward layer of {size} rows, "
            f"the shards hold {ffn}"
        )
    if values["vocab_size"] != rows:
        raise SchemaError(
            f"params.json contradicts the shards: vocab_size is {vocabulary}, the shards hold "
            f"{rows} rows of {EMBEDDING}"
        )
    if family == "llama" and values["kv_channels"] * heads != hidden:
        raise SchemaError(
            f"params.json: head_dim {said['head_dim']} is not dim / n_heads, as in any Llama"
        )
    extra = windows_extra(None if window is None else int(window), [True] * said["n_layers"])
    scaling = _scaling_from_params(said)
    return ModelSpec(
        family=family,
        architecture="MistralForCausalLM" if family == "mistral" else "LlamaForCausalLM",
        ffn_hidden_size=size,
        max_position_embeddings=said.get("max_seq_len") or assumed_context(family, values, scaling),
        rotary_scaling=scaling,
        extra=extra,
        **values,
    )


def params_from_spec(spec: ModelSpec, *, by_width: bool) -> dict[str, Any]:
    """Return the ``params.json`` of a model; ``by_width`` is how its shards cut the embedding.

    A key that says what an older release has no word for is left out where that release means the
    same without it: Meta's code of the time takes no unknown keys.

    Raises:
        SchemaError: Meta's model is not this one; see `unsupported_by_meta`.
    """
    if problems := unsupported_by_meta(spec):
        raise SchemaError(f"Meta's model does not have: {', '.join(problems)}")
    params = {key: getattr(spec, attribute) for key, attribute in FIELDS}
    if spec.family == "mistral":
        params |= {key: getattr(spec, attribute) for key, attribute in MISTRAL_FIELDS}
        if "sliding_window" in spec.extra:
            params["sliding_window"] = spec.extra["sliding_window"]
        return params
    multiple, factor = _feed_forward_factors(spec.hidden_size, spec.ffn_hidden_size)
    params["multiple_of"] = multiple
    if factor is not None:
        params["ffn_dim_multiplier"] = factor
    if spec.num_query_groups == spec.num_attention_heads:
        del params["n_kv_heads"]
    if by_width and spec.rotary_base == _OLD_THETA:
        del params["rope_theta"]
    return params | _scaling_to_params(spec)


def unsupported_by_meta(spec: ModelSpec) -> list[str]:
    """Return what a spec says that Meta's model cannot be, one reason each."""
    said = Biases.of(spec)
    window = windowed_layers(spec)
    llama = spec.family == "llama"
    scaling = spec.rotary_scaling
    constants = {"rope_type": "llama3", **LLAMA3_CONSTANTS}
    scaled = {key: value for key, value in (scaling or {}).items() if key != "factor"}
    held = (
        (spec.normalization == "RMSNorm", f"normalization {spec.normalization}"),
        (spec.activation == "swiglu", f"activation {spec.activation}"),
        (spec.position_embedding_type == "rope", f"{spec.position_embedding_type} positions"),
        (spec.rotary_percent == 1.0, f"rotary_percent {spec.rotary_percent}"),
        (not spec.qk_layernorm, "norms of query and key"),
        (not (said.qkv or said.out or said.mlp), "biases"),
        (
            not llama or spec.kv_channels * spec.num_attention_heads == spec.hidden_size,
            f"heads of {spec.kv_channels} rows, not dim / n_heads",
        ),
        (not any(window) if llama else len(set(window)) < 2, "a sliding window in these layers"),
        (
            scaling is None or (llama and scaled == constants),
            f"rotary scaling {dict(scaling or {})}",
        ),
    )
    return [reason for fits, reason in held if not fits]


def cut_by_width(spec: ModelSpec) -> bool:
    """Return whether a release with such a vocabulary cuts the embedding along its width."""
    return (spec.vocab_size or 0) <= _TIKTOKEN and spec.rotary_scaling is None


def feed_forward_size(params: Mapping[str, Any]) -> int:
    """Return the rows of the gate that Meta's code computes.

    Examples:
        >>> feed_forward_size({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3})
        14336
    """
    size = int(2 * (4 * params["dim"]) / 3)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None:
        size = int(factor * size)
    multiple: int = params.get("multiple_of") or _DEFAULT_MULTIPLE
    return -(-size // multiple) * multiple


def assumed_context(
    family: str, values: Mapping[str, Any], scaling: Mapping[str, Any] | None
) -> int:
    """Return the longest context of the release that has such numbers; the file does not say it.

    Source: transformers convert_llama_weights_to_hf.py, CONTEXT_LENGTH_FOR_VERSION @ v4.46.3.
    """
    if family == "mistral":
        return 32768
    if scaling is not None:
        return 131072
    if values["rotary_base"] == _OLD_THETA:
        return 2048 if values["norm_epsilon"] == 1e-6 else 4096
    return 8192 if values["vocab_size"] > _TIKTOKEN else 16384


def _check_keys(said: Mapping[str, Any]) -> None:
    missing = [key for key in _ESSENTIAL if said.get(key) is None]
    if missing:
        raise SchemaError(f"params.json does not say {', '.join(missing)}")
    unknown = [key for key in said if key not in _UNDERSTOOD | _RUNTIME and said[key]]
    if unknown:
        raise SchemaError(
            f"params.json says {listing(unknown)}, which ckptx does not know for this layout; the "
            "model may be another one than its weights look like"
        )
    for key in _COUNTS:
        value = said.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise SchemaError(f"params.json: {key} is {value!r}, expected a number above 0")
    for key in _NUMBERS:
        value = said.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SchemaError(f"params.json: {key} is {value!r}, expected a number")
    window = said.get("sliding_window")
    if window is not None and not str(window).isdecimal():
        raise SchemaError(f"params.json: sliding_window is {window!r}, expected one number")


def _scaling_from_params(said: Mapping[str, Any]) -> dict[str, Any] | None:
    if not said.get("use_scaled_rope"):
        return None
    scaling = {"rope_type": "llama3", "factor": _implied_factor(said["dim"], said["n_layers"])}
    scaling |= LLAMA3_CONSTANTS
    if said.get("rope_scaling_factor") is not None:
        scaling["factor"] = float(said["rope_scaling_factor"])
    if said.get("rope_high_freq_factor") is not None:
        scaling["high_freq_factor"] = float(said["rope_high_freq_factor"])
    return scaling


def _scaling_to_params(spec: ModelSpec) -> dict[str, Any]:
    if spec.rotary_scaling is None:
        return {}
    factor = spec.rotary_scaling["factor"]
    implied = _implied_factor(spec.hidden_size, spec.num_layers)
    return {"use_scaled_rope": True} | (
        {} if factor == implied else {"rope_scaling_factor": factor}
    )


def _implied_factor(dim: int, layers: int) -> float:
    return _FACTOR_OF_32 if (dim, layers) in _LLAMA_32_SIZES else _FACTOR


def _feed_forward_factors(dim: int, ffn: int) -> tuple[int, float | None]:
    """Return ``multiple_of`` and ``ffn_dim_multiplier`` that give a feed-forward layer."""
    for multiple, factor in _candidates(dim, ffn):
        params = {"dim": dim, "multiple_of": multiple, "ffn_dim_multiplier": factor}
        if feed_forward_size(params) == ffn:
            return multiple, factor
    raise SchemaError(f"no multiple_of and ffn_dim_multiplier give {ffn} rows for dim {dim}")


def _candidates(dim: int, ffn: int) -> Iterator[tuple[int, float | None]]:
    yield from _PUBLISHED
    multiple = ffn & -ffn  # the largest power of two that divides it
    yield multiple, None
    # Half a multiple below the size, so that rounding the factor cannot matter.
    for step in (multiple, ffn):
        yield step, round((ffn - step / 2) / math.floor(8 * dim / 3), 6)
