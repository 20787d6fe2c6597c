"""The activation of the MLP in Megatron's args.

Megatron's Gelu is exact unless bias and activation run as one kernel: that kernel computes the tanh
form. Its command line turns the kernel off for models without biases.

Source: NVIDIA/Megatron-LM megatron/core/fusions/{fused_bias_gelu,fused_bias_geglu}.py,
megatron/core/transformer/mlp.py, megatron/training/arguments.py (validate_args) @ core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptx.errors import SchemaError
from ckptx.model.spec import ModelSpec

SWITCHES = ("swiglu", "squared_relu", "quick_geglu")
"""Switches of ``args`` for the activations of their names; none of them means a form of Gelu."""
FUSION, GATED = "bias_gelu_fusion", "gated_linear_unit"


def from_args(args: Mapping[str, Any]) -> str:
    """Return the activation that args mean.

    Raises:
        SchemaError: they mean several.

    Examples:
        >>> from_args({"swiglu": True}), from_args({})
        ('swiglu', 'gelu_tanh')
    """
    on = [switch for switch in SWITCHES if args.get(switch)]
    if len(on) > 1:
        raise SchemaError(f"{' and '.join(on)} are set in args; a model has one activation")
    if on:
        return on[0]
    fused = args.get(FUSION)
    if fused is None:
        fused = args.get("add_bias_linear", True) and not args.get("disable_bias_linear")
    return ("geglu" if args.get(GATED) else "gelu") + ("_tanh" if fused else "")


def to_args(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments that say a spec's activation."""
    said: dict[str, Any] = {switch: spec.activation == switch for switch in SWITCHES}
    if spec.activation not in SWITCHES:
        said[FUSION] = spec.activation.endswith("_tanh")
    return {**said, GATED: spec.gated}


def launch_flags(spec: ModelSpec) -> list[str]:
    """Return the options for what Megatron does not take from a checkpoint."""
    flags = {"quick_geglu": "--quick-geglu", "gelu": "--no-bias-gelu-fusion"}
    exact_anyway = spec.activation == "gelu" and not spec.add_bias_linear
    return [flags[spec.activation]] if spec.activation in flags and not exact_anyway else []


def notes(spec: ModelSpec) -> Iterator[str]:
    """Yield what Megatron's command line cannot say, one line each."""
    if spec.activation == "gelu_tanh" and not spec.add_bias_linear:
        yield (
            "tanh form of gelu without biases: Megatron's command line then computes the exact "
            "form; build TransformerConfig with "
            "activation_func=functools.partial(F.gelu, approximate='tanh')"
        )
    if spec.activation in ("geglu", "geglu_tanh"):
        fused = spec.activation.endswith("_tanh")
        yield (
            f"{'tanh form of ' * fused}gelu with a gate: Megatron's command line cannot say it; "
            "build TransformerConfig with activation_func=F.gelu, gated_linear_unit=True, "
            f"bias_activation_fusion={fused}"
        )
