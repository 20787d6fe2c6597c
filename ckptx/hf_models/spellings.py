"""The words of transformers 4 in a config that transformers 5 wrote.

Transformers 5 reads either; 4.x takes its default for what it does not find, without a word. So a
config that has ``rope_parameters`` or ``num_local_experts`` alone would make another model there.

Source: huggingface/transformers src/transformers/modeling_rope_utils.py
(convert_rope_params_to_dict) @ v5.23.0, src/transformers/models/qwen3_moe/*.py @ v4.57.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptx.protocol.sidecars import dump_config
from ckptx.registry.families import family_of

_NEW = "rope_parameters"
_LOCAL_THETA = "rope_local_base_freq"
"""The base of windowed layers, where those have their own."""


def with_old_keys(data: bytes) -> bytes:
    """Return a ``config.json`` with the keys of transformers 4 beside those that say the same.

    What is no config, or has them, stays as it is, byte for byte.

    Examples:
        >>> new = b'{"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}'
        >>> json.loads(with_old_keys(new))["rope_theta"]
        5000.0
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return data  # who reads it says so
    if not isinstance(config, dict):
        return data
    found = _completed(config)
    return data if found == config else dump_config(found)


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        key: _completed(value)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping)
    }
    known = getattr(family_of(config), "config", None)
    words = getattr(known, "old_words", None)
    theta, part, count = words if words else ("rope_theta", "partial_rotary_factor", "num_experts")
    found = _rotary(config, theta, part)
    if count and count not in config and "num_local_experts" in config:
        found[count] = config["num_local_experts"]
    return {**config, **parts, **found}


def _rotary(config: Mapping[str, Any], theta: str, part: str) -> dict[str, Any]:
    """Return the old keys of a rotary embedding that a config says in the new ones alone."""
    new = config.get(_NEW)
    if not isinstance(new, Mapping) or config.get("rope_scaling"):
        return {}
    found: dict[str, Any] = {}
    if isinstance(whole := new.get("full_attention"), Mapping):
        windowed = new.get("sliding_attention")
        if isinstance(windowed, Mapping) and windowed != whole and "rope_theta" in windowed:
            found[_LOCAL_THETA] = windowed["rope_theta"]
        new = whole
    scaling = dict(new)
    if "rope_theta" in scaling:
        found[theta] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        found[part] = scaling.pop("partial_rotary_factor")
    if scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    return {key: value for key, value in found.items() if config.get(key) is None}
