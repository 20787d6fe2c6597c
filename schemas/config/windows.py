"""Sliding windows: which layers have one, by each family's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.traits import ConfigTable

_SLIDING, _FULL = "sliding_attention", "full_attention"


def windowed_layers(spec: ModelSpec) -> list[bool]:
    """Return for every layer whether it attends within the sliding window only."""
    if spec.extra.get("sliding_window") is None:
        return [False] * spec.num_layers
    types = spec.extra.get("layer_types") or [_SLIDING] * spec.num_layers
    return [kind == _SLIDING for kind in types]


def windows_extra(window: int | None, layers: list[bool]) -> dict[str, Any]:
    """Return the entries of ``extra`` for a window of ``window`` tokens, the own one included."""
    if window is None or not any(layers):
        return {}
    if all(layers):
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": _types(layers)}


def from_config(config: Mapping[str, Any], traits: ConfigTable) -> dict[str, Any]:
    """Return the entries of ``extra`` that a config's keys say."""
    kind, types = traits.windows, config.get("layer_types")
    if kind == "none":
        return {}
    kept = {"max_window_layers": config["max_window_layers"]} if kind == "some layers" else {}
    if kept and not config["use_sliding_window"]:
        return kept
    if types is None or kind == "all layers":
        # Of Gemma 2, before it said so, every second layer has one.
        first, step = kept.get("max_window_layers", 0), 2 if kind == "layer types" else 1
        layers = range(config["num_hidden_layers"])
        inside = [layer >= first and not layer % step for layer in layers]
    else:
        inside = [one == _SLIDING for one in types]
    return kept | windows_extra(config["sliding_window"], inside)


def to_config(spec: ModelSpec, traits: ConfigTable) -> dict[str, Any]:
    """Return the keys of a config that say a spec's windows."""
    window = spec.extra.get("sliding_window")
    if traits.windows == "none":
        return {}
    if traits.windows == "all layers":
        return {"sliding_window": window}
    inside = windowed_layers(spec)
    if traits.windows == "layer types":
        return {"sliding_window": window, "layer_types": _types(inside)}
    first = inside.index(True) if True in inside else len(inside)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": spec.extra.get("max_window_layers", first),
        "layer_types": _types(inside),
    }


def holds(spec: ModelSpec, traits: ConfigTable) -> bool:
    """Return whether a family's config can say a spec's windows."""
    inside = windowed_layers(spec)
    return (
        traits.windows in ("some layers", "layer types")
        or not any(inside)
        or (traits.windows == "all layers" and all(inside))
    )


def _types(layers: list[bool]) -> list[str]:
    return [_SLIDING if inside else _FULL for inside in layers]
