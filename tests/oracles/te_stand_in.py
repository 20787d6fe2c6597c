"""A pure-torch stand-in for the Transformer Engine classes under megatron's own TE wrappers.

It proves names and shapes only: parameter names, their order, their shapes and cuts, and where an
``_extra_state`` sits, as megatron's TE layer spec makes them. It knows no fp8, no kernels, no
backward pass, and says nothing of Transformer Engine's numerics (forward is the plain formula).

``_extra_state`` is as in TE >= 2.0 without fp8: an empty uint8 tensor, on every module incl. norms.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

VERSION = "2.6.0"  # 2.7 would need the router kernels


class _Module(nn.Module):
    """A TE module without fp8: its extra state is empty and ignored on load."""

    fp8 = False
    fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Do nothing, as TE does outside an fp8 context."""

    def get_extra_state(self) -> Tensor:
        """Return the empty byte tensor of TE >= 2.0."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Accept the extra state of a module without fp8."""
        if state is not None and not (isinstance(state, Tensor) and state.numel() == 0):
            raise ValueError(f"the stand-in has no fp8 and takes an empty tensor, not {state!r}")


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def _normalise(
    x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float, *, zero_centred: bool
) -> Tensor:
    scale = weight + 1 if zero_centred else weight
    if kind == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    return F.layer_norm(x, x.shape[-1:], scale, bias, eps)


class _Norm(_Module):
    kind = "LayerNorm"

    def __init__(
        self,
        hidden_size: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        zero_centered_gamma: bool = False,
        *,
        normalized_shape: int | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        hidden_size = hidden_size or normalized_shape  # core 0.19 calls it as torch does
        assert hidden_size is not None  # one of them is given
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.weight = _parameter(hidden_size, dtype=params_dtype)
        self.register_parameter("bias", None)
        if self.kind == "LayerNorm":
            self.bias = _parameter(hidden_size, dtype=params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined] # megatron reads it

    def forward(self, x: Tensor) -> Tensor:
        return _normalise(
            x, self.kind, self.weight, self.bias, self.eps, zero_centred=self.zero_centered_gamma
        )


class LayerNorm(_Norm):
    """Stand for ``transformer_engine.pytorch.LayerNorm``."""


class RMSNorm(_Norm):
    """Stand for ``transformer_engine.pytorch.RMSNorm``."""

    kind = "RMSNorm"


class Linear(_Module):
    """Stand for ``transformer_engine.pytorch.Linear``: full sizes in, the rank's cut as weight."""

    normalization: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__()
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.use_bias, self.return_bias = bias, return_bias
        self._add_norm(in_features, params_dtype, options)
        self.weight = _parameter(self.out_features, self.in_features, dtype=params_dtype)
        if bias:
            self.bias = _parameter(self.out_features, dtype=params_dtype)

    def _add_norm(self, size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Register what precedes ``weight``; nothing here."""

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        bias = self.bias if self.use_bias else None
        if self.parallel_mode != "row" or self.tp_size == 1:
            out = F.linear(x, self.weight, None if self.return_bias else bias)
            return (out, bias) if self.return_bias else out
        out = F.linear(x, self.weight).detach().contiguous()
        torch.distributed.all_reduce(out, group=self.tp_group)
        if self.return_bias:
            return out, bias
        return out if bias is None else out + bias


class LayerNormLinear(Linear):
    """Stand for ``transformer_engine.pytorch.LayerNormLinear``; the norm comes first."""

    def _add_norm(self, size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.eps: float = options["eps"]
        self.normalization = options["normalization"]
        self.zero_centered_gamma: bool = options["zero_centered_gamma"]
        self.layer_norm_weight = _parameter(size, dtype=dtype)
        self.layer_norm_bias: nn.Parameter | None = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = _parameter(size, dtype=dtype)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        x = _normalise(
            x,
            str(self.normalization),
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            zero_centred=self.zero_centered_gamma,
        )
        return super().forward(x, is_first_microbatch)


class GroupedLinear(_Module):
    """Stand for ``transformer_engine.pytorch.GroupedLinear``: ``weight0..``, then ``bias0..``."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        **_: object,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        for gemm in range(num_gemms):
            setattr(self, f"weight{gemm}", _parameter(rows, columns, dtype=params_dtype))
        for gemm in range(num_gemms if bias else 0):
            setattr(self, f"bias{gemm}", _parameter(rows, dtype=params_dtype))

    def forward(
        self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Any:
        biases = [getattr(self, f"bias{gemm}", None) for gemm in range(self.num_gemms)]
        out = torch.cat(
            [
                F.linear(
                    part, getattr(self, f"weight{gemm}"), None if self.return_bias else biases[gemm]
                )
                for gemm, part in enumerate(torch.split(x, list(m_splits)))
            ]
        )
        return (out, biases) if self.return_bias else out


def _forgive_missing_extra_state(_: nn.Module, incompatible: Any) -> None:
    """Let core_attention._extra_state be absent, as TE does: torch_dist checkpoints have none."""
    kept = [key for key in incompatible.missing_keys if "core_attention._extra_state" not in key]
    incompatible.missing_keys[:] = kept


class DotProductAttention(_Module):
    """Stand for ``transformer_engine.pytorch.DotProductAttention``, layout sbhd, no dropout."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        *,
        num_gqa_groups: int | None = None,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.softmax_scale, self.window_size = softmax_scale, window_size
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str = "causal",
        **_: object,
    ) -> Tensor:
        """Return [sequence, batch, heads * value channels]; a True in the mask hides a position."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        rows = torch.arange(q.shape[2])[:, None]
        columns = torch.arange(k.shape[2])[None, :]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if "causal" in attn_mask_type:
            seen &= columns <= rows
        elif attention_mask is not None:
            seen = ~attention_mask
        if self.window_size is not None and self.window_size[0] >= 0:
            seen = seen & (columns >= rows - self.window_size[0])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class CudaRNGStatesTracker:
    """Base class only; megatron's own tracker is the one in use."""

    def reset(self) -> None:
        """Forget all states."""


class DelayedScaling:
    """A name for ``isinstance``; there is no fp8 here."""


class _FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class _QuantizedTensor(Tensor):
    """A name for ``isinstance``; no tensor is one."""


def _absent(*_: object, **__: object) -> Any:
    raise NotImplementedError("not in the Transformer Engine stand-in")


_MODULES: dict[str, dict[str, Any]] = {
    "": {"__version__": VERSION},
    "common": {},
    "common.recipe": {"DelayedScaling": DelayedScaling},
    "pytorch": {
        "Linear": Linear,
        "LayerNormLinear": LayerNormLinear,
        "LayerNorm": LayerNorm,
        "RMSNorm": RMSNorm,
        "GroupedLinear": GroupedLinear,
        "DotProductAttention": DotProductAttention,
    },
    "pytorch.distributed": {
        "CudaRNGStatesTracker": CudaRNGStatesTracker,
        "activation_recompute_forward": _absent,
        "checkpoint": _absent,
        "is_fp8_activation_recompute_enabled": lambda: False,
    },
    "pytorch.fp8": {
        "FP8GlobalStateManager": _FP8GlobalStateManager,
        **dict.fromkeys(("fp8_autocast", "fp8_model_init"), _absent),
    },
    "pytorch.ops": {
        "Sequential": nn.Sequential,
        "FusibleOperation": nn.Module,
        # Operations that megatron fuses if it is asked to; here they are names in its tables.
        **dict.fromkeys(("GELU", "GEGLU", "ReLU", "ReGLU", "SiLU", "SwiGLU"), nn.Module),
    },
    "pytorch.tensor": {"QuantizedTensor": _QuantizedTensor},
}


def register() -> None:
    """Put the stand-in into ``sys.modules``; megatron copes with the ImportError of other names."""
    for path, names in _MODULES.items():
        full_name = f"transformer_engine.{path}".rstrip(".")
        module = types.ModuleType(full_name)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[full_name] = module
        parent, _, child = full_name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
