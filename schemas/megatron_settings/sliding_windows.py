"""Sliding windows of attention in Megatron's ``args``, in both directions.

Source: NVIDIA/Megatron-LM megatron/core/transformer/utils.py (get_sliding_window_causal_mask,
is_layer_window_attention) @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.model.spec import ModelSpec
from ckptx.schemas.config.windows import windowed_layers


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return ``window_size``, which counts tokens before the own one, and the layers without."""
    inside = windowed_layers(spec)
    if not any(inside):
        return {"window_size": None, "window_attn_skip_freq": None}
    pattern = None if all(inside) else [int(one) for one in inside]
    return {"window_size": (spec.extra["sliding_window"] - 1, 0), "window_attn_skip_freq": pattern}


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options for what Megatron does not take from a checkpoint."""
    said = to_args(spec)
    found = []
    if said["window_size"]:
        found += ["--window-size", ",".join(str(side) for side in said["window_size"])]
    if said["window_attn_skip_freq"]:
        found += ["--window-attn-skip-freq", str(said["window_attn_skip_freq"]).replace(" ", "")]
    return found


def from_args(args: Mapping[str, Any]) -> tuple[int | None, list[bool]]:
    """Return the window in tokens, the own one included, and which layers have it."""
    size, layers = args.get("window_size"), args["num_layers"]
    if not size or size[0] < 0:
        return None, [False] * layers
    frequency = args.get("window_attn_skip_freq")
    if frequency is None:
        inside = [True] * layers
    elif isinstance(frequency, int):
        inside = [number % frequency != 0 for number in range(1, layers + 1)]
    else:
        inside = [bool(one) for one in frequency]
    return size[0] + 1, inside


def notes(spec: ModelSpec) -> Iterator[str]:
    """Yield what Megatron must be told by hand, one line each."""
    if needed := launch_flags(spec):
        yield (
            f"sliding_window {spec.extra['sliding_window']}: Megatron does not take it from a "
            f"checkpoint; pass {' '.join(needed)} (core 0.15 or later; earlier ones attend to "
            "everything)"
        )
