"""Base, rotated part and scaling of rotary embeddings, in the words of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.traits import ConfigTable

_DEFAULT_THETA = 10000.0
_KEYS = {
    *("rope_type", "factor", "original_max_position_embeddings", "attention_factor", "truncate"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "finetuned"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
    *("low_freq_factor", "high_freq_factor"),
}
"""Those that a scaling may have, of any kind; transformers reads no others.

Source: huggingface/transformers src/transformers/modeling_rope_utils.py @ v5.23.0.
"""


def from_config(
    config: Mapping[str, Any], traits: ConfigTable
) -> tuple[float, float, dict[str, Any] | None]:
    """Return base, rotated part and scaling; ``rope_scaling`` wins over ``rope_parameters``.

    Source: modeling_rope_utils.py convert_rope_params_to_dict @ v5.23.0.
    """
    said = _said(config)
    scaling = {key: value for key, value in said.items() if key != "type"}
    kind = scaling.pop("rope_type", said.get("type", "default"))
    theta, part = traits.rotary_keys
    base = scaling.pop("rope_theta", config.get(theta))
    percent = scaling.pop("partial_rotary_factor", config.get(part))
    if percent is None or traits.rotary_percent is None:
        percent = traits.rotary_percent
    return (
        float(_DEFAULT_THETA if base is None else base),
        float(1.0 if percent is None else percent),
        None
        if kind == "default" and scaling.keys() <= _KEYS
        else {"rope_type": traits.scalings.get(kind, kind), **scaling},
    )


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what either spelling says; keys beside those of layer types are kept among theirs."""
    said: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [value for value in said.values() if isinstance(value, Mapping)]
    if any(other != nested[0] for other in nested):
        raise SchemaError("rope_parameters differ between layer types; this family has one set")
    beside = {key: value for key, value in said.items() if not isinstance(value, Mapping)}
    return {**nested[0], **beside} if nested else beside


def assumed(config: Mapping[str, Any], traits: ConfigTable) -> dict[str, Any]:
    """Return base and rotated part where a config leaves them to the defaults of its class."""
    if traits.position_embedding_type != "rope":
        return {}
    defaults = (traits.defaults.get(traits.rotary_keys[0], _DEFAULT_THETA), traits.rotary_percent)
    said, inner = _said(config), ("rope_theta", "partial_rotary_factor")
    return {
        key: default
        for key, name, default in zip(traits.rotary_keys, inner, defaults, strict=True)
        if said.get(name) is None and config.get(key) is None
    }


def unknown_keys(spec: ModelSpec) -> list[str]:
    """Return the keys of a spec's scaling that no kind of scaling has: misspelt, or of a fork."""
    return sorted((spec.rotary_scaling or {}).keys() - _KEYS)


def to_config(spec: ModelSpec, traits: ConfigTable) -> dict[str, Any]:
    """Return the keys of both spellings; none for a family without rotary embedding."""
    if traits.position_embedding_type != "rope":
        return {}
    scaling = None if spec.rotary_scaling is None else dict(spec.rotary_scaling)
    theta, part = traits.rotary_keys
    keys = {theta: spec.rotary_base, "rope_scaling": scaling}
    inner = {"rope_theta": spec.rotary_base, **(scaling or {"rope_type": "default"})}
    if traits.rotary_percent is not None:
        keys[part] = inner["partial_rotary_factor"] = spec.rotary_percent
    return {**keys, "rope_parameters": inner}
