"""``config.json`` of decoders and `ModelSpec`, in both directions.

`FIELDS` pairs the keys that mean the same under another name, in Llama's spelling; a family that
spells them otherwise says so in its `ConfigTable`. Biases, rotary embedding and sliding window
each have a pair of functions (`ckptx.schemas.config`), because their keys depend on each other.
What a family fixes without saying so in its config is in `FAMILIES`.

A key that is absent has the default of its class in transformers, not one of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config import mixtures
from ckptx.schemas.config.families import FAMILIES, MEGATRON_ONLY
from ckptx.schemas.config.rotary import rotary_from_config, rotary_to_config
from ckptx.schemas.config.traits import (
    Biases,
    ConfigTable,
    biases,
    biases_from_config,
    biases_to_config,
    from_biases,
    holds_biases,
    named_biases,
)
from ckptx.schemas.config.windows import (
    holds_windows,
    windowed_layers,
    windows_extra,
    windows_from_config,
    windows_to_config,
)
from ckptx.schemas.megatron_settings.settings import FUNCTION

__all__ = [
    "FAMILIES",
    "FIELDS",
    "MEGATRON_ONLY",
    "Biases",
    "ConfigTable",
    "biases",
    "check",
    "config_from_spec",
    "differences",
    "merge_config",
    "spec_from_config",
    "unsupported_by_config",
    "windowed_layers",
    "windows_extra",
]

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

_ALIASED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")

# transformers computes float32 where a config says nothing.
_DEFAULT_DTYPE = "float32"


def spec_from_config(config: Mapping[str, Any], family: str) -> ModelSpec:
    """Return the dimensions that a ``config.json`` says, in any transformers version's spelling.

    Raises:
        SchemaError: the family is unknown, or the config asks for what it cannot be: another
            activation, heads that do not divide, a rotary embedding per layer type.
    """
    traits = _traits(family)
    values = mixtures.prepared({**traits.defaults, **_own_words(config, traits)}, family)
    sizes = _sizes(values, traits)
    activation_key = str(traits.key("hidden_act"))
    activation = traits.activations.get(values[activation_key])
    if activation is None:
        raise SchemaError(
            f"{activation_key} is {values[activation_key]!r}, family {family} is known with "
            f"{' or '.join(map(repr, traits.activations))} only"
        )
    base, percent, scaling = rotary_from_config(values, traits)
    architectures = config.get("architectures") or [traits.architecture]
    switches, extra = from_biases(biases_from_config(values, traits))
    return ModelSpec(
        family=family,
        architecture=architectures[0],
        **{attribute: sizes[key] for key, attribute in _fields(traits)},
        multi_latent_attention=traits.latent,
        **switches,
        **mixtures.from_config(values, family),
        normalization=traits.normalization,
        activation=activation,
        position_embedding_type=traits.position_embedding_type,
        rotary_base=base,
        rotary_percent=percent,
        rotary_scaling=scaling,
        qk_layernorm=traits.qk_layernorm,
        dtype=_dtype_from_config(values),
        extra={
            **extra,
            **windows_from_config(values, traits),
            **traits.fixed,
            **_kept_from_config(values, traits),
        },
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
        **_settings(spec, traits),
        **biases_to_config(biases(spec), traits),
        **mixtures.to_config(spec),
        **windows_to_config(spec, traits),
        **rotary_to_config(spec, traits),
        **_kept(spec, traits),
        **dict.fromkeys(traits.dropouts, 0.0),
        "use_cache": True,
        # A config without them says 1 and 2 for Llama and Mistral, true or not.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
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
    traits = FAMILIES[spec.family]
    switches = biases_to_config(biases(spec), traits)
    source = _settings(spec, traits) | switches | _kept(spec, traits)
    merged.update((key, source[key]) for key in found if key in source)
    merged |= mixtures.respelled(set(found), spec)
    if "model_type" in found:
        merged |= {"model_type": spec.family, "architectures": [spec.architecture]}
        merged |= switches
    theta, part = traits.rotary_keys
    if found.keys() & {theta, part, "rope_scaling"}:
        rotary = rotary_to_config(spec, traits)
        merged |= _respelled(rotary, config, (theta, part), "rope_parameters")
        if spec.rotary_scaling is None and merged.get("rope_scaling") is not None:
            merged["rope_scaling"] = None
    if found.keys() & {"sliding_window", "layer_types"}:
        merged |= windows_to_config(spec, traits)
    if "dtype" in found:
        both = {"dtype": spec.dtype, "torch_dtype": spec.dtype}
        merged |= _respelled(both, config, ("torch_dtype",), "dtype")
    return merged


def unsupported_by_config(spec: ModelSpec, family: str) -> list[str]:
    """Return what a spec says that the config of a family cannot say, one reason each."""
    traits = _traits(family)
    wanted = biases(spec)
    grouped = spec.num_query_groups != spec.num_attention_heads
    odd_heads = spec.kv_channels * spec.num_attention_heads != spec.hidden_size
    positions = f"{spec.position_embedding_type} positions"
    percent = traits.rotary_percent is not None or spec.rotary_percent == 1.0
    further = any(attribute == "mtp_num_layers" for _, attribute in traits.fields)
    held = (
        (spec.normalization == traits.normalization, f"normalization {spec.normalization}"),
        (spec.activation in traits.activations.values(), f"activation {spec.activation}"),
        (spec.position_embedding_type == traits.position_embedding_type, positions),
        (percent, f"rotary_percent {spec.rotary_percent}"),
        (spec.qk_layernorm == traits.qk_layernorm, f"qk_layernorm {spec.qk_layernorm}"),
        (holds_biases(wanted, traits), f"biases on {named_biases(wanted)}"),
        (holds_windows(spec, traits), "sliding windows in these layers"),
        (spec.multi_latent_attention == traits.latent, _latent(spec)),
        (not spec.mtp_num_layers or further, "multi-token prediction"),
        (not grouped or traits.key("num_key_value_heads"), "query groups"),
        (not odd_heads or traits.key("head_dim"), "heads of a size of their own"),
        *(
            (bool(spec.extra.get(name)) == (name in traits.fixed), _foreign(spec, name))
            for name in MEGATRON_ONLY
        ),
    )
    reasons = [reason for fits, reason in held if not fits]
    changed = spec.extra.get(FUNCTION, {})
    reasons += [f"{k} {v!r} (--accept-arg {k} ignores it)" for k, v in changed.items()]
    return reasons + mixtures.unsupported_by_config(spec, family)


def check(spec: ModelSpec) -> None:
    """Raise a SchemaError unless the spec's family has a config that can say all of it."""
    if spec.family not in FAMILIES:
        reasons = unsupported_by_config(spec, "llama")
        because = f" (Llama's relatives do not have: {', '.join(reasons)})" if reasons else ""
        raise SchemaError(
            f"no Hugging Face family is known for this {spec.architecture}{because}; families are "
            f"{', '.join(FAMILIES)}"
        )
    if reasons := unsupported_by_config(spec, spec.family):
        raise SchemaError(f"{spec.architecture} does not have: {', '.join(reasons)}")


def _traits(family: str) -> ConfigTable:
    if family not in FAMILIES:
        raise SchemaError(f"no config table for family {family!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _family_of(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return the family a config is of: the spec's where it does not say."""
    said = config.get("model_type", spec.family)
    if said not in FAMILIES:  # Kimi K2 is DeepSeek V3 under a name of its own
        classes = config.get("architectures") or []
        said = next((name for name, t in FAMILIES.items() if t.architecture in classes), said)
    if said not in FAMILIES:
        raise SchemaError(
            f"model_type {said!r} of the config is not one of {', '.join(FAMILIES)}, the source is "
            f"{spec.family}; give the config of the same model"
        )
    return str(said)


def _fields(traits: ConfigTable) -> tuple[tuple[str, str], ...]:
    return (*FIELDS, *traits.fields)


def _own_words(config: Mapping[str, Any], traits: ConfigTable) -> dict[str, Any]:
    """Return a config in its family's words, where it has the usual ones.

    Raises:
        SchemaError: it has both, and they differ.

    Source: huggingface/transformers src/transformers/models/gpt2/configuration_gpt2.py,
    attribute_map @ v5.23.0.
    """
    found = dict(config)
    for name in _ALIASED:
        key = traits.key(name)
        if key is None or key == name or name not in config:
            continue
        if config.get(key, config[name]) != config[name]:
            raise SchemaError(
                f"{key} is {config[key]!r} and {name} is {config[name]!r}, which mean the same; "
                "remove the wrong one from the config"
            )
        found[key] = config[name]
    return found


def _sizes(values: Mapping[str, Any], traits: ConfigTable) -> dict[str, Any]:
    """Return the values of a family's fields, completed as the config classes do."""
    found: dict[str, Any] = {}
    for name, _ in _fields(traits):
        key = traits.key(name)
        found[name] = None if key is None else values[key]
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if found["intermediate_size"] is None:
        found["intermediate_size"] = 4 * hidden
    if found["head_dim"] is None:
        if hidden % heads:
            raise SchemaError(
                f"hidden_size {hidden} does not divide over {heads} heads and there is no head_dim"
            )
        found["head_dim"] = hidden // heads
    if heads % found["num_key_value_heads"]:
        raise SchemaError(
            f"{heads} heads do not divide over num_key_value_heads {found['num_key_value_heads']}"
        )
    return found


def _settings(spec: ModelSpec, traits: ConfigTable) -> dict[str, Any]:
    """Return what can be compared and has one key in a config."""
    values = {key: getattr(spec, attribute) for key, attribute in _fields(traits)}
    said = [word for word, meaning in traits.activations.items() if meaning == spec.activation]
    values["hidden_act"] = said[0] if said else spec.activation
    keys = {name: traits.key(name) for name in values}
    return {key: values[name] for name, key in keys.items() if key is not None}


def _kept_from_config(values: Mapping[str, Any], traits: ConfigTable) -> dict[str, Any]:
    said = {key: values.get(key, plain) for key, plain in traits.passthrough_keys.items()}
    return {key: value for key, value in said.items() if value != traits.passthrough_keys[key]}


def _kept(spec: ModelSpec, traits: ConfigTable) -> dict[str, Any]:
    return {key: spec.extra.get(key, plain) for key, plain in traits.passthrough_keys.items()}


def _latent(spec: ModelSpec) -> str:
    return f"{'' if spec.multi_latent_attention else 'no '}multi-latent attention"


def _foreign(spec: ModelSpec, name: str) -> str:
    return name if spec.extra.get(name) else f"no {name}"


def _contradictions(theirs: ModelSpec, ours: ModelSpec) -> dict[str, tuple[Any, Any]]:
    traits = FAMILIES[ours.family]
    theta, part = traits.rotary_keys

    def compared(spec: ModelSpec) -> dict[str, Any]:
        said = biases(spec)
        switches = biases_to_config(said, traits)
        return {
            "model_type": spec.family,
            **_settings(spec, traits),
            **mixtures.compared(spec, ours.family),
            **(switches or {"attention_bias": said.qkv, "mlp_bias": said.mlp}),
            theta: spec.rotary_base,
            part: spec.rotary_percent,
            "rope_scaling": spec.rotary_scaling,
            "sliding_window": spec.extra.get("sliding_window"),
            "layer_types": windowed_layers(spec),
            "dtype": spec.dtype,
            **_kept(spec, traits),
        }

    found, wanted = compared(theirs), compared(ours)
    if theirs.family != ours.family:  # each fixes its own
        found.pop("attention_bias", None)
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
    both: Mapping[str, Any], config: Mapping[str, Any], old: tuple[str, ...], new: str
) -> dict[str, Any]:
    """Return of both spellings those that a config uses, both where it uses neither."""
    if new in config and old[0] not in config:
        return {new: both[new]}
    if old[0] in config and new not in config:
        return {key: value for key, value in both.items() if key != new}
    return dict(both)


def _dtype_from_config(config: Mapping[str, Any]) -> str:
    said = config.get("dtype") or config.get("torch_dtype") or _DEFAULT_DTYPE
    return str(said).removeprefix("torch.")
