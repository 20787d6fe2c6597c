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
    said: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [value for value in said.values() if isinstance(value, Mapping)]
    if nested:
        if any(other != nested[0] for other in nested):
            raise SchemaError("rope_parameters differ between layer types; this family has one set")
        said = nested[0]
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
