"""``config.json`` of decoders and `ModelSpec`, in both directions.

`FIELDS` pairs the keys that mean the same under another name, in Llama's spelling; a family that
spells them otherwise says so in its `ConfigTable`, with what it fixes without saying so in its
config. Biases, experts, rotary embedding and sliding window have functions of their own
(`ckptx.schemas.config`), because their keys depend on each other.

A key that is absent has the default of its class in transformers, not one of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.family import FUNCTION_SETTINGS, MEGATRON_SWITCHES, FamilyConfig, function_settings
from ckptx.model.spec import ModelSpec
from ckptx.registry import registry
from ckptx.schemas.config import rotary, windows
from ckptx.schemas.config.traits import Biases, ConfigTable
from ckptx.schemas.config.unknown_keys import ALIASED, assumed_values, unknown_keys

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

# transformers computes float32 where a config says nothing.
_DEFAULT_DTYPE = "float32"


@dataclass(frozen=True)
class TableConfig(FamilyConfig):
    """The config of a family whose keys a table says; a `FamilyConfig`."""

    family: str
    table: ConfigTable

    @property
    def old_words(self) -> tuple[str, str, str]:
        """Base, rotated part and number of experts, in the words of transformers 4."""
        return *self.table.rotary_keys, self.table.experts.count if self.table.experts else ""

    def from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """Return the dimensions that a ``config.json`` says, in any transformers version's words.

        Raises:
            SchemaError: it asks for what the family cannot be: another activation, heads that do
                not divide, a rotary embedding per layer type.
        """
        table = self.table
        own = _own_words(config, table)
        values = {**table.defaults, **own}
        if table.experts:
            values = table.experts.prepared(values, self.family)
        sizes = _sizes(values, table)
        activation_key = str(table.key("hidden_act"))
        activation = table.activations.get(values[activation_key])
        if activation is None:
            raise SchemaError(
                f"{activation_key} is {values[activation_key]!r}, family {self.family} is known "
                f"with {' or '.join(map(repr, table.activations))} only"
            )
        base, percent, scaling = rotary.from_config(values, table)
        architectures = config.get("architectures") or [table.architecture]
        switches, extra = table.biases(values).to_spec()
        spec = ModelSpec(
            family=self.family,
            architecture=architectures[0],
            **{attribute: sizes[key] for key, attribute in _fields(table)},
            multi_latent_attention=table.latent,
            **switches,
            **(table.experts.attributes(values) if table.experts else {}),
            normalization=table.normalization,
            activation=activation,
            position_embedding_type=table.position_embedding_type,
            rotary_base=base,
            rotary_percent=percent,
            rotary_scaling=scaling,
            qk_layernorm=table.qk_layernorm,
            dtype=_dtype_from_config(values),
            unknown_keys=unknown_keys(config, table),
            assumed=assumed_values(own, table),
        )
        extra |= {**windows.from_config(values, table), **table.fixed}
        return replace(spec, extra={**extra, **_kept_from_config(values, spec, table)})

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Return a complete ``config.json`` for a model whose own is not at hand.

        Both spellings of the rotary embedding and of the dtype are in it: transformers 5 reads
        ``rope_parameters`` and ``dtype``, 4.x ``rope_theta``, ``rope_scaling`` and ``torch_dtype``,
        and each accepts the other's. Token numbers are left to the generation config.

        Raises:
            SchemaError: the config cannot say what the spec says, or the vocabulary size is
                unknown.
        """
        self.check(spec)
        if spec.vocab_size is None:
            raise SchemaError(
                "the true vocabulary size is unknown; pass --true-vocab-size or --hf-base"
            )
        table = self.table
        return {
            "architectures": [spec.architecture],
            "model_type": spec.family,
            **_settings(spec, table),
            **table.bias_switches(Biases.of(spec)),
            **(table.experts.settings(spec) if table.experts else {}),
            **windows.to_config(spec, table),
            **rotary.to_config(spec, table),
            **_kept(spec, table),
            **dict.fromkeys(table.dropouts, 0.0),
            "use_cache": True,
            # A config without them says 1 and 2 for Llama and Mistral, true or not.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": spec.dtype,
            "torch_dtype": spec.dtype,
        }

    def differences(self, config: Mapping[str, Any], spec: ModelSpec) -> list[str]:
        """Return one line per key in which a config contradicts a spec of Megatron's args.

        Compares meanings, not spellings: a config that leaves a key to its class's default, or
        says it in an older transformers' words, does not differ.

        Examples:
            >>> config = TableConfig("llama", ConfigTable("LlamaForCausalLM"))
            >>> spec = config.from_config({"rope_theta": 500000.0})
            >>> config.differences({"rope_theta": 10000.0}, spec)
            ['rope_theta: config 10000, source args 500000']
        """
        return [
            f"{key}: config {_shown(found)}, source args {_shown(wanted)}"
            for key, (found, wanted) in self._contradictions(config, spec).items()
        ]

    def merge_config(self, config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
        """Return a config in which the spec wins where both speak, and all else is left alone.

        Raises:
            SchemaError: the config cannot say what the spec says.
        """
        self.check(spec)
        merged = dict(config)
        found = self._contradictions(config, spec)
        if not found:
            return merged
        table = self.table
        switches = table.bias_switches(Biases.of(spec))
        source = _settings(spec, table) | switches | _kept(spec, table)
        merged.update((key, source[key]) for key in found if key in source)
        if table.experts:
            merged |= table.experts.respelled(set(found), spec)
        if "model_type" in found:
            merged |= {"model_type": spec.family, "architectures": [spec.architecture]}
            merged |= switches
        theta, part = table.rotary_keys
        if found.keys() & {theta, part, "rope_scaling"}:
            both = rotary.to_config(spec, table)
            merged |= _respelled(both, config, (theta, part), "rope_parameters")
            if spec.rotary_scaling is None and merged.get("rope_scaling") is not None:
                merged["rope_scaling"] = None
        if found.keys() & {"sliding_window", "layer_types"}:
            merged |= windows.to_config(spec, table)
        if "dtype" in found:
            both = {"dtype": spec.dtype, "torch_dtype": spec.dtype}
            merged |= _respelled(both, config, ("torch_dtype",), "dtype")
        return merged

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Return what a spec says that the config cannot say, one reason each."""
        table = self.table
        wanted = Biases.of(spec)
        grouped = spec.num_query_groups != spec.num_attention_heads
        odd_heads = spec.kv_channels * spec.num_attention_heads != spec.hidden_size
        positions = f"{spec.position_embedding_type} positions"
        percent = table.rotary_percent is not None or spec.rotary_percent == 1.0
        mtp = any(attribute == "mtp_num_layers" for _, attribute in table.fields)
        held = (
            (spec.normalization == table.normalization, f"normalization {spec.normalization}"),
            (spec.activation in table.activations.values(), f"activation {spec.activation}"),
            (spec.position_embedding_type == table.position_embedding_type, positions),
            (percent, f"rotary_percent {spec.rotary_percent}"),
            (spec.qk_layernorm == table.qk_layernorm, f"qk_layernorm {spec.qk_layernorm}"),
            (table.biases(table.bias_switches(wanted)) == wanted, f"biases on {wanted}"),
            (windows.holds(spec, table), "sliding windows in these layers"),
            (spec.multi_latent_attention == table.latent, _latent(spec)),
            (not spec.mtp_num_layers or mtp, "multi-token prediction"),
            (not grouped or table.key("num_key_value_heads"), "query groups"),
            (not odd_heads or table.key("head_dim"), "heads of a size of their own"),
            *(
                (bool(spec.extra.get(name)) == (name in table.fixed), _foreign(spec, name))
                for name in MEGATRON_SWITCHES
            ),
            (table.experts or not spec.num_experts, "experts"),
            (not spec.extra.get(FUNCTION_SETTINGS), function_settings(spec)),
        )
        reasons = [reason for fits, reason in held if not fits]
        return reasons + (table.experts.unsupported(spec) if table.experts else [])

    def unsupported_by_megatron(self, spec: ModelSpec) -> Iterator[str]:
        """Yield what of the config's own keys Megatron cannot compute, one reason each."""
        if unknown := spec.unknown_keys:
            said = " and ".join(f"{key}={json.dumps(value):.60}" for key, value in unknown.items())
            yield (
                f"{spec.architecture} with {said}, which no {spec.architecture} of transformers "
                "has: correct the config, or convert as if it were without "
                f"({' '.join(f'--accept-config-key {key}' for key in unknown)})"
            )
        for key in rotary.unknown_keys(spec):
            yield (
                f"{spec.architecture} with {key} in rope_scaling or rope_parameters, a key that "
                "no rotary embedding has: correct the config"
            )
        for key, reason in self.table.megatron_lacks.items():
            neutral = self.table.neutral(key, spec)
            value = spec.extra.get(key, neutral)
            if value != neutral:
                yield f"{spec.architecture} with {key}={json.dumps(value)}: {reason}"

    def of_family(self, spec: ModelSpec) -> ModelSpec:
        """Return a spec that Megatron's settings say as one of the family."""
        table = self.table
        own = {key: value for key, value in table.fixed.items() if key not in MEGATRON_SWITCHES}
        extra = {**own, **spec.extra}
        return replace(spec, family=self.family, architecture=table.architecture, extra=extra)

    def check(self, spec: ModelSpec) -> None:
        """Raise a SchemaError unless the config can say all of a spec."""
        if reasons := self.unsupported(spec):
            raise SchemaError(f"{spec.architecture} does not have: {', '.join(reasons)}")

    def _contradictions(
        self, config: Mapping[str, Any], ours: ModelSpec
    ) -> dict[str, tuple[Any, Any]]:
        table = self.table
        theirs = self._reader(config).from_config(config)
        theta, part = table.rotary_keys

        def compared(spec: ModelSpec) -> dict[str, Any]:
            said = Biases.of(spec)
            switches = table.bias_switches(said)
            return {
                "model_type": spec.family,
                **_settings(spec, table),
                **(table.experts.compared(spec) if table.experts else {}),
                **(switches or {"attention_bias": said.qkv, "mlp_bias": said.mlp}),
                theta: spec.rotary_base,
                part: spec.rotary_percent,
                "rope_scaling": spec.rotary_scaling,
                "sliding_window": spec.extra.get("sliding_window"),
                "layer_types": windows.windowed_layers(spec),
                "dtype": spec.dtype,
                **_kept(spec, table),
            }

        found, wanted = compared(theirs), compared(ours)
        if theirs.family != ours.family:  # each fixes its own
            found.pop("attention_bias", None)
        if ours.vocab_size is None:  # Megatron knows the padded size only
            del found["vocab_size"], wanted["vocab_size"]
        if found["sliding_window"] is None or wanted["sliding_window"] is None:
            del found["layer_types"], wanted["layer_types"]  # said by sliding_window already
        return {key: (found[key], wanted[key]) for key in found if found[key] != wanted[key]}

    def _reader(self, config: Mapping[str, Any]) -> FamilyConfig:
        """Return what reads a config: the own family where it does not say another."""
        said = config.get("model_type", self.family)
        if said == self.family:
            return self
        classes = config.get("architectures") or []
        families = [family for family in registry.families().values() if family.model_types]
        for family in families:
            if said in family.model_types:
                return family.config
        for family in families:
            if any(name in classes for name in family.architectures):
                return family.config
        raise SchemaError(
            f"model_type {said!r} of the config is not one of "
            f"{', '.join(family.name for family in families)}, the source is {self.family}; give "
            "the config of the same model"
        )


def _fields(table: ConfigTable) -> tuple[tuple[str, str], ...]:
    return (*FIELDS, *table.fields)


def _own_words(config: Mapping[str, Any], table: ConfigTable) -> dict[str, Any]:
    """Return a config in its family's words, where it has the usual ones.

    Raises:
        SchemaError: it has both, and they differ.

    Source: huggingface/transformers src/transformers/models/gpt2/configuration_gpt2.py,
    attribute_map @ v5.23.0.
    """
    found = dict(config)
    for name in ALIASED:
        key = table.key(name)
        if key is None or key == name or name not in config:
            continue
        if config.get(key, config[name]) != config[name]:
            raise SchemaError(
                f"{key} is {config[key]!r} and {name} is {config[name]!r}, which mean the same; "
                "remove the wrong one from the config"
            )
        found[key] = config[name]
    return found


def _sizes(values: Mapping[str, Any], table: ConfigTable) -> dict[str, Any]:
    """Return the values of a family's fields, completed as the config classes do."""
    found: dict[str, Any] = {}
    for name, _ in _fields(table):
        key = table.key(name)
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


def _settings(spec: ModelSpec, table: ConfigTable) -> dict[str, Any]:
    """Return what can be compared and has one key in a config."""
    values = {key: getattr(spec, attribute) for key, attribute in _fields(table)}
    said = [word for word, meaning in table.activations.items() if meaning == spec.activation]
    values["hidden_act"] = said[0] if said else spec.activation
    keys = {name: table.key(name) for name in values}
    return {key: values[name] for name, key in keys.items() if key is not None}


def _kept_from_config(
    values: Mapping[str, Any], spec: ModelSpec, table: ConfigTable
) -> dict[str, Any]:
    neutral = {key: table.neutral(key, spec) for key in table.passthrough_keys}
    said = {key: values.get(key, value) for key, value in neutral.items()}
    return {key: value for key, value in said.items() if value != neutral[key]}


def _kept(spec: ModelSpec, table: ConfigTable) -> dict[str, Any]:
    return {key: spec.extra.get(key, table.neutral(key, spec)) for key in table.passthrough_keys}


def _latent(spec: ModelSpec) -> str:
    return f"{'' if spec.multi_latent_attention else 'no '}multi-latent attention"


def _foreign(spec: ModelSpec, name: str) -> str:
    return name if spec.extra.get(name) else f"no {name}"


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
