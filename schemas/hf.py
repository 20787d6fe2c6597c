"""``config.json`` of Llama-like decoders and `ModelSpec`, in both directions.

`FIELDS` pairs the keys that mean the same under another name; biases, rotary embedding and sliding
window each have a pair of functions, because their keys depend on each other. What a family fixes
without saying so in its config is in `FAMILIES`.

A key that is absent has the default of its class in transformers, not one of ours. Those that
matter here are the same in 4.x and 5.x.

Source: huggingface/transformers src/transformers/models/{llama,mistral,qwen2,qwen3}/
configuration_*.py and modeling_*.py, modeling_rope_utils.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ckptx.errors import SchemaError
from ckptx.schemas import experts
from ckptx.spec import ModelSpec

Windows: TypeAlias = Literal["none", "all layers", "some layers"]

FIELDS = (
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_query_groups"),
    ("head_dim", "kv_channels"),
    ("vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("rms_norm_eps", "norm_epsilon"),
    ("tie_word_embeddings", "tied"),
)
"""Pairs of a config's key and the spec's attribute."""


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections have a bias."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family fixes, and the defaults of its config class."""

    architecture: str
    defaults: Mapping[str, Any]
    bias_keys: tuple[str, ...] = ()
    """The switches that the config has; ``attention_bias`` is for query, key, value and output."""
    fixed_biases: Biases = field(default_factory=Biases)
    qk_layernorm: bool = False
    windows: Windows = "none"


_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_MIXTRAL_DEFAULTS = _MISTRAL_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
_QWEN2_MOE_DEFAULTS = _QWEN2_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
_QWEN3_MOE_DEFAULTS = _QWEN2_MOE_DEFAULTS | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
_OLMOE_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

FAMILIES: Mapping[str, Traits] = {
    "llama": Traits("LlamaForCausalLM", _LLAMA_DEFAULTS, ("attention_bias", "mlp_bias")),
    "mistral": Traits("MistralForCausalLM", _MISTRAL_DEFAULTS, windows="all layers"),
    "qwen2": Traits(
        "Qwen2ForCausalLM",
        _QWEN2_DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
    ),
    "qwen3": Traits(
        "Qwen3ForCausalLM",
        _QWEN2_DEFAULTS | {"head_dim": 128},
        ("attention_bias",),
        qk_layernorm=True,
        windows="some layers",
    ),
    "mixtral": Traits("MixtralForCausalLM", _MIXTRAL_DEFAULTS, windows="all layers"),
    "qwen2_moe": Traits(
        "Qwen2MoeForCausalLM",
        _QWEN2_MOE_DEFAULTS,
        fixed_biases=Biases(qkv=True),
        windows="some layers",
    ),
    "qwen3_moe": Traits(
        "Qwen3MoeForCausalLM",
        _QWEN3_MOE_DEFAULTS,
        ("attention_bias",),
        qk_layernorm=True,
        windows="all layers",
    ),
    "olmoe": Traits("OlmoeForCausalLM", _OLMOE_DEFAULTS, ("attention_bias",)),
}

# Megatron switches that change what the weights mean and that no config of these families can say.
FOREIGN = (
    "layernorm_zero_centered_gamma",
    "rotary_interleaved",
    "qk_l2_norm",
    "no_rope_freq",
    "attention_output_gate",
)

# transformers computes float32 where a config says nothing.
_DEFAULT_DTYPE = "float32"
_DEFAULT_THETA = 10000.0


def spec_from_config(config: Mapping[str, Any], family: str) -> ModelSpec:
    """Return the dimensions that a ``config.json`` says, in any transformers version's spelling.

    Raises:
        SchemaError: the family is unknown, or the config asks for what it cannot be: another
            activation, heads that do not divide, a rotary embedding per layer type.
    """
    traits = _traits(family)
    values = experts.prepared({**traits.defaults, **config}, family)
    if values["hidden_act"] != "silu":
        raise SchemaError(
            f"hidden_act is {values['hidden_act']!r}, family {family} is known with 'silu' only"
        )
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        if hidden % heads:
            raise SchemaError(
                f"hidden_size {hidden} does not divide over {heads} heads and there is no head_dim"
            )
        values["head_dim"] = hidden // heads
    if heads % values["num_key_value_heads"]:
        raise SchemaError(
            f"{heads} heads do not divide over num_key_value_heads {values['num_key_value_heads']}"
        )
    base, percent, scaling = _rotary_from_config(values)
    architectures = config.get("architectures") or [traits.architecture]
    switches, extra = _from_biases(_biases_from_config(values, traits))
    return ModelSpec(
        family=family,
        architecture=architectures[0],
        **{attribute: values[key] for key, attribute in FIELDS},
        **switches,
        **experts.from_config(values, family),
        rotary_base=base,
        rotary_percent=percent,
        rotary_scaling=scaling,
        qk_layernorm=traits.qk_layernorm,
        dtype=_dtype_from_config(values),
        extra=extra | _windows_from_config(values, traits),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Return a complete ``config.json`` for a model whose own is not at hand.

    Both spellings of the rotary embedding and of the dtype are in it: transformers 5 reads
    ``rope_parameters`` and ``dtype``, 4.x ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, and
    each accepts the other's. Token numbers are left to the generation config.

    Raises:
        SchemaError: the family's config cannot say what the spec says, or the vocabulary size is
            unknown.
    """
    check(spec)
    if spec.vocab_size is None:
        raise SchemaError(
            "the true vocabulary size is unknown; pass --true-vocab-size or --hf-base"
        )
    traits = FAMILIES[spec.family]
    return {
        "architectures": [spec.architecture],
        "model_type": spec.family,
        **{key: getattr(spec, attribute) for key, attribute in FIELDS},
        "hidden_act": "silu",
        **_biases_to_config(biases(spec), traits),
        **experts.to_config(spec),
        **_windows_to_config(spec, traits),
        **_rotary_to_config(spec),
        "attention_dropout": 0.0,
        "use_cache": True,
        # A config without them says 1 and 2 for Llama and Mistral, true or not.
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": spec.dtype,
        "torch_dtype": spec.dtype,
    }


def differences(config: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Return one line per key in which a config contradicts a spec derived from Megatron's args.

    Compares meanings, not spellings: a config that leaves a key to its class's default, or says it
    in an older transformers' words, does not differ.

    Examples:
        >>> spec = spec_from_config({"rope_theta": 500000.0}, "llama")
        >>> differences({"rope_theta": 10000.0, "model_type": "llama"}, spec)
        ['rope_theta: config 10000, source args 500000']
    """
    theirs = spec_from_config(config, _family_of(config, spec))
    return [
        f"{key}: config {_shown(found)}, source args {_shown(wanted)}"
        for key, (found, wanted) in _contradictions(theirs, spec).items()
    ]


def merge_config(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return a config in which the spec wins where both speak, and all else is left alone.

    Raises:
        SchemaError: the family's config cannot say what the spec says.
    """
    check(spec)
    merged = dict(config)
    found = _contradictions(spec_from_config(config, _family_of(config, spec)), spec)
    if not found:
        return merged
    source = _settings(spec) | _biases_to_config(biases(spec), FAMILIES[spec.family])
    merged.update((key, source[key]) for key in found if key in source)
    merged |= experts.respelled(set(found), spec)
    if "model_type" in found:
        merged |= {"model_type": spec.family, "architectures": [spec.architecture]}
        merged |= _biases_to_config(biases(spec), FAMILIES[spec.family])
    if found.keys() & {"rope_theta", "rope_scaling"}:
        merged |= _respelled(_rotary_to_config(spec), config, "rope_theta", "rope_parameters")
        if spec.rotary_scaling is None and merged.get("rope_scaling") is not None:
            merged["rope_scaling"] = None
    if found.keys() & {"sliding_window", "layer_types"}:
        merged |= _windows_to_config(spec, FAMILIES[spec.family])
    if "dtype" in found:
        both = {"dtype": spec.dtype, "torch_dtype": spec.dtype}
        merged |= _respelled(both, config, "torch_dtype", "dtype")
    return merged


def biases(spec: ModelSpec) -> Biases:
    """Return which projections of a model have a bias."""
    every = spec.add_bias_linear
    return Biases(
        every or spec.add_qkv_bias,
        every or bool(spec.extra.get("attention_out_bias")),
        every or bool(spec.extra.get("mlp_bias")),
    )


def unheld(spec: ModelSpec, family: str) -> list[str]:
    """Return what a spec says that the config of a family cannot say, one reason each."""
    traits = _traits(family)
    wanted = biases(spec)
    held = (
        (spec.normalization == "RMSNorm", f"normalization {spec.normalization}"),
        (spec.activation == "swiglu", f"activation {spec.activation}"),
        (spec.position_embedding_type == "rope", f"{spec.position_embedding_type} positions"),
        (spec.rotary_percent == 1.0, f"rotary_percent {spec.rotary_percent}"),
        (spec.qk_layernorm == traits.qk_layernorm, f"qk_layernorm {spec.qk_layernorm}"),
        (_holds_biases(wanted, traits), f"biases on {_named(wanted)}"),
        (_holds_windows(spec, traits), "sliding windows in these layers"),
        *((not spec.extra.get(name), name) for name in FOREIGN),
    )
    reasons = [reason for fits, reason in held if not fits]
    return reasons + experts.unheld(spec, family)


def check(spec: ModelSpec) -> None:
    """Raise a SchemaError unless the spec's family has a config that can say all of it."""
    if spec.family not in FAMILIES:
        reasons = unheld(spec, "llama")
        because = f" (Llama's relatives do not have: {', '.join(reasons)})" if reasons else ""
        raise SchemaError(
            f"no Hugging Face family is known for this {spec.architecture}{because}; families are "
            f"{', '.join(FAMILIES)}"
        )
    if reasons := unheld(spec, spec.family):
        raise SchemaError(f"{spec.architecture} does not have: {', '.join(reasons)}")


def windowed_layers(spec: ModelSpec) -> list[bool]:
    """Return for every layer whether it attends within the sliding window only."""
    if spec.extra.get("sliding_window") is None:
        return [False] * spec.num_layers
    types = spec.extra.get("layer_types") or ["sliding_attention"] * spec.num_layers
    return [kind == "sliding_attention" for kind in types]


def windows_extra(window: int | None, layers: list[bool]) -> dict[str, Any]:
    """Return the entries of ``extra`` for a window of ``window`` tokens, the own one included."""
    if window is None or not any(layers):
        return {}
    if all(layers):
        return {"sliding_window": window}
    types = ["sliding_attention" if inside else "full_attention" for inside in layers]
    return {"sliding_window": window, "layer_types": types}


def _traits(family: str) -> Traits:
    if family not in FAMILIES:
        raise SchemaError(f"no config table for family {family!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _family_of(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return the family a config is of: the spec's where it does not say."""
    said = config.get("model_type", spec.family)
    if said not in FAMILIES:
        raise SchemaError(
            f"model_type {said!r} of the config is not one of {', '.join(FAMILIES)}, the source is "
            f"{spec.family}; give the config of the same model"
        )
    return str(said)


def _settings(spec: ModelSpec) -> dict[str, Any]:
    """Return what can be compared and has one key in a config."""
    return {key: getattr(spec, attribute) for key, attribute in FIELDS}


def _contradictions(theirs: ModelSpec, ours: ModelSpec) -> dict[str, tuple[Any, Any]]:
    def compared(spec: ModelSpec) -> dict[str, Any]:
        bias = biases(spec)
        return {
            "model_type": spec.family,
            **_settings(spec),
            **experts.compared(spec, ours.family),
            "attention_bias": bias.qkv,
            "mlp_bias": bias.mlp,
            "rope_theta": spec.rotary_base,
            "rope_scaling": spec.rotary_scaling,
            "sliding_window": spec.extra.get("sliding_window"),
            "layer_types": windowed_layers(spec),
            "dtype": spec.dtype,
        }

    found, wanted = compared(theirs), compared(ours)
    if theirs.family != ours.family:  # each fixes its own
        del found["attention_bias"], wanted["attention_bias"]
    if ours.vocab_size is None:  # Megatron knows the padded size only
        del found["vocab_size"], wanted["vocab_size"]
    if found["sliding_window"] is None or wanted["sliding_window"] is None:
        del found["layer_types"], wanted["layer_types"]  # said by sliding_window already
    return {key: (found[key], wanted[key]) for key in found if found[key] != wanted[key]}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value < 1 or not value.is_integer() else str(int(value))
    if isinstance(value, list) and value and isinstance(value[0], bool):
        return f"window in {sum(value)} of {len(value)} layers"
    return str(value)


def _respelled(
    both: Mapping[str, Any], config: Mapping[str, Any], old: str, new: str
) -> dict[str, Any]:
    """Return of both spellings those that a config uses, both where it uses neither."""
    if new in config and old not in config:
        return {new: both[new]}
    if old in config and new not in config:
        return {key: value for key, value in both.items() if key != new}
    return dict(both)


def _dtype_from_config(config: Mapping[str, Any]) -> str:
    said = config.get("dtype") or config.get("torch_dtype") or _DEFAULT_DTYPE
    return str(said).removeprefix("torch.")


def _rotary_from_config(
    config: Mapping[str, Any],
) -> tuple[float, float, dict[str, Any] | None]:
    """Return base, rotated part and scaling; ``rope_scaling`` wins over ``rope_parameters``.

    Source: modeling_rope_utils.py convert_rope_params_to_dict @ v5.23.0.
    """
    said: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [value for value in said.values() if isinstance(value, Mapping)]
    if nested:
        if any(other != nested[0] for other in nested):
            raise SchemaError("rope_parameters differ between layer types; this family has one set")
        said = nested[0]
    scaling = {key: value for key, value in said.items() if key != "type"}
    kind = scaling.pop("rope_type", said.get("type", "default"))
    base = scaling.pop("rope_theta", config.get("rope_theta"))
    percent = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    return (
        float(_DEFAULT_THETA if base is None else base),
        float(1.0 if percent is None else percent),
        None if kind == "default" else {"rope_type": kind, **scaling},
    )


def _rotary_to_config(spec: ModelSpec) -> dict[str, Any]:
    scaling = None if spec.rotary_scaling is None else dict(spec.rotary_scaling)
    return {
        "rope_theta": spec.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": spec.rotary_base,
            **(scaling or {"rope_type": "default"}),
        },
    }


def _biases_from_config(config: Mapping[str, Any], traits: Traits) -> Biases:
    attention = "attention_bias" in traits.bias_keys and bool(config.get("attention_bias"))
    mlp = "mlp_bias" in traits.bias_keys and bool(config.get("mlp_bias"))
    fixed = traits.fixed_biases
    return Biases(fixed.qkv or attention, fixed.out or attention, fixed.mlp or mlp)


def _biases_to_config(said: Biases, traits: Traits) -> dict[str, bool]:
    values = {"attention_bias": said.out, "mlp_bias": said.mlp}
    return {key: values[key] for key in traits.bias_keys}


def _from_biases(said: Biases) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the spec's switches, and entries of ``extra`` for what Megatron has no switch for."""
    if said == Biases(True, True, True):
        return {"add_bias_linear": True, "add_qkv_bias": False}, {}
    extra = {"attention_out_bias": said.out, "mlp_bias": said.mlp}
    return {"add_qkv_bias": said.qkv}, {name: True for name, value in extra.items() if value}


def _holds_biases(said: Biases, traits: Traits) -> bool:
    config = _biases_to_config(said, traits)
    return _biases_from_config(config, traits) == said


def _named(said: Biases) -> str:
    parts = (("qkv", said.qkv), ("attention output", said.out), ("mlp", said.mlp))
    return ", ".join(name for name, value in parts if value) or "nothing"


def _windows_from_config(config: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    if traits.windows == "none":
        return {}
    window, layers = config["sliding_window"], config["num_hidden_layers"]
    if traits.windows == "all layers":
        return windows_extra(window, [True] * layers)
    kept = {"max_window_layers": config["max_window_layers"]}
    if not config["use_sliding_window"]:
        return kept
    types = config.get("layer_types")
    inside = (
        [number >= config["max_window_layers"] for number in range(layers)]
        if types is None
        else [kind == "sliding_attention" for kind in types]
    )
    return kept | windows_extra(window, inside)


def _windows_to_config(spec: ModelSpec, traits: Traits) -> dict[str, Any]:
    window = spec.extra.get("sliding_window")
    if traits.windows == "none":
        return {}
    if traits.windows == "all layers":
        return {"sliding_window": window}
    inside = windowed_layers(spec)
    first = inside.index(True) if True in inside else len(inside)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": spec.extra.get("max_window_layers", first),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in inside],
    }


def _holds_windows(spec: ModelSpec, traits: Traits) -> bool:
    inside = windowed_layers(spec)
    return (
        traits.windows == "some layers"
        or not any(inside)
        or (traits.windows == "all layers" and all(inside))
    )
