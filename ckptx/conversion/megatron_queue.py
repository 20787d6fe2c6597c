"""Queues that Megatron-style modules put to and get from, and the translation of their messages.

The dictionaries carry the very names of our messages: ``{"name": "transformer layer 3",
"qkv weight": tensor, ...}``. Only the metadata namespace before them, and ``"done"`` after
them, have another shape.

This is the one place in ckptx that handles torch tensors, because the modules do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ckptx.conversion.proof import Proof
from ckptx.errors import ConversionError, PlanError, PluginError, listing
from ckptx.model.spec import ModelSpec
from ckptx.protocol.messages import PASSTHROUGH, Begin, End, Message, SourceTensor, Tensors
from ckptx.protocol.model import check_state
from ckptx.storage.spool import Spool
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor, Shape, Stored
from ckptx.text.plain import plain

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_ORDER = ("embeddings", "transformer layer", "final norm", "output layer", "pooler", "lm head")


class _Queue:
    def close(self) -> None:
        """Do nothing; a real queue has this."""

    join_thread = cancel_join_thread = close


class ReceiveQueue(_Queue):
    """What a Megatron-style loader sees as its queue."""

    def __init__(self, name: str, spool: Spool, checking: bool) -> None:
        self._name = name
        self._spool = spool
        self._checking = checking
        self._metadata: Any = None
        self._received: list[Tensors] = []
        self._place = (-1, -1)
        self._ending = ""

    def put(self, message: Any, block: bool = True, timeout: float | None = None) -> None:
        """Take one message of the module; its tensors go to the spool."""
        if isinstance(message, str):
            if message not in ("done", "exit"):
                raise self._wrong(f"sent {message!r}, expected 'done' or 'exit'")
            self._ending = self._ending or message
        elif self._ending:
            raise self._wrong(f"sent more after {self._ending!r}")
        elif self._metadata is None:
            if not hasattr(message, "num_layers"):
                raise self._wrong(
                    "must send its metadata first, a namespace with num_layers and more"
                )
            self._metadata = message
        elif not isinstance(message, Mapping) or not isinstance(message.get("name"), str):
            raise self._wrong(f"sent {type(message).__name__}, expected a dictionary with a 'name'")
        else:
            self._take(message)

    put_nowait = put

    def messages(self, root: str) -> Iterator[Message]:
        """Yield what the module has sent, as our messages.

        Raises:
            ConversionError: the module gave up, or returned too early.
        """
        if self._ending != "done":
            how = "gave up (it sent 'exit')" if self._ending else "returned without sending 'done'"
            raise ConversionError(f"loader module {self._name!r} {how}; see what it printed")
        sources = tuple(
            SourceTensor(f"{message.name}: {key}", tensor)
            for message in self._received
            for key, tensor in message.tensors.items()
        )
        yield Begin(
            format="megatron-style",
            layout="canonical",
            parts={"language": spec_of(self._metadata, self._received)},
            files=(self._spool.path,),
            sources=sources,
            root=root,
            training=_training(self._metadata),
            parallel={
                "tp": getattr(self._metadata, "previous_tensor_parallel_size", None) or 1,
                "pp": getattr(self._metadata, "previous_pipeline_parallel_size", None) or 1,
            },
        )
        yield from self._received
        yield End()

    def _take(self, message: Mapping[str, Any]) -> None:
        name = message["name"]
        if self._checking:
            self._check_order(name)
        tensors: dict[str, LazyTensor] = {}
        for key, value in message.items():
            if key == "name" or value is None:
                continue
            if not hasattr(value, "dtype") or not hasattr(value, "shape"):
                raise self._wrong(f"sent {key!r} of {name!r} as {type(value).__name__}, no tensor")
            tensors[key] = self._spooled(value)
        self._received.append(Tensors(name, tensors))

    def _spooled(self, value: Any) -> Stored:
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in ITEMSIZE:
            raise self._wrong(f"sent a tensor of dtype {dtype}, which ckptx does not know")
        shape = tuple(value.shape)
        if hasattr(value, "detach"):
            import torch

            flat = value.detach().cpu().contiguous().reshape(-1)
            value = flat.view(torch.uint8).numpy() if flat.numel() else b""
        return self._spool.put(value, dtype, shape)

    def _check_order(self, name: str) -> None:
        match = re.fullmatch(r"transformer layer (\d+)", name)
        kind = "transformer layer" if match else name
        if kind not in _ORDER:
            return
        place = (_ORDER.index(kind), int(match[1]) if match else 0)
        follows = self._place[1] + 1 if self._place[0] == place[0] else 0
        if place[0] < self._place[0] or (match and place[1] != follows):
            raise self._wrong(
                f"sent {name!r} out of order; if it means to, pass --no-checking", ConversionError
            )
        self._place = place

    def _wrong(
        self, what: str, kind: type[PluginError | ConversionError] = PluginError
    ) -> PluginError | ConversionError:
        return kind(f"loader module {self._name!r} {what}")


class SendQueue(_Queue):
    """What a Megatron-style saver sees as its queue: one message in memory at a time."""

    def __init__(
        self,
        name: str,
        messages: Iterator[Message],
        model_type: str,
        advance: Callable[[int], None],
    ) -> None:
        self._name = name
        self._model_type = model_type
        self._advance = advance
        self._proof = Proof()
        self._messages = messages
        self._files: tuple[str, ...] = ()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next message: the metadata namespace, a dictionary, at last ``"done"``."""
        for message in self._messages:
            if isinstance(message, Begin):
                self._files = message.files
                if not message.parts:
                    raise PlanError(
                        f"saver {self._name!r} needs canonical tensors, and the family of "
                        f"{message.layout!r} has no schema"
                    )
                return metadata_of(message, self._model_type)
            if isinstance(message, End):
                continue
            check_state(message)
            if message.name == PASSTHROUGH:
                raise PlanError(
                    f"saver {self._name!r} cannot take tensors by name: {listing(message.tensors)}"
                )
            return {"name": message.name, **self._materialised(message.tensors)}
        return "done"

    get_nowait = get

    def proof(self, staging: Path) -> Proof:
        """Return what the module has taken and written, once it has returned.

        Raises:
            ConversionError: it returned before it had read every message, or wrote nothing.
        """
        # Megatron's own savers read to "done"; others may stop before it.
        if isinstance(next(self._messages, None), Begin | Tensors):
            raise ConversionError(
                f"saver module {self._name!r} returned before it had read everything"
            )
        files = [path for path in staging.rglob("*") if path.is_file()]
        if not files:
            raise ConversionError(
                f"saver module {self._name!r} wrote nothing to its save_dir, {staging}"
            )
        self._proof.files = len(files)
        self._proof.bytes_out = sum(path.stat().st_size for path in files)
        return self._proof

    def _materialised(self, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
        import numpy as np
        import torch

        from ckptx.storage.gather import read

        values = {}
        for key, tensor in tensors.items():
            flat = read(tensor, self._files).reshape(-1).view(np.uint8)
            dtype = getattr(torch, tensor.dtype)
            values[key] = torch.from_numpy(flat).view(dtype).reshape(tensor.shape)
            self._proof.tensors += 1
            self._proof.bytes_in += tensor.nbytes
            self._advance(tensor.nbytes)
        return values


def spec_of(metadata: Any, messages: list[Tensors]) -> ModelSpec:
    """Return the model dimensions of a metadata namespace; tensors tell what it leaves out.

    The protocol names no family. A gated model with RMS norms is taken for a Llama, or for the Qwen
    that has its query, key and value biases or norms; with experts for a Mixtral.
    """
    args = getattr(metadata, "checkpoint_args", None) or SimpleNamespace()
    get = _lookup(metadata, args)
    shapes = {key: t.shape for m in messages[::-1] for key, t in m.tensors.items()}
    heads, hidden = metadata.num_attention_heads, metadata.hidden_size
    channels = get("kv_channels", None) or hidden // heads
    swiglu, qk_norm = bool(get("swiglu", False)), "q norm weight" in shapes
    bias = bool(getattr(metadata, "qkv_bias", False))
    rms = not getattr(metadata, "norm_has_bias", get("normalization", "RMSNorm") == "LayerNorm")
    family = "qwen3" if qk_norm else "qwen2" if bias else "llama"
    experts = get("num_experts", None) or None
    known = swiglu and rms and not getattr(metadata, "linear_bias", False)
    if experts:
        known = known and family == "llama"
        family = "mixtral"
    architecture = _ARCHITECTURES[family]
    return ModelSpec(
        family=family if known else "",
        architecture=architecture if known else "",
        num_layers=metadata.num_layers,
        hidden_size=hidden,
        ffn_hidden_size=get("ffn_hidden_size", None) or shapes.get("mlp l1 weight", (0, 0))[-1],
        num_attention_heads=heads,
        num_query_groups=_groups(shapes.get("qkv weight"), heads, channels, get),
        kv_channels=channels,
        vocab_size=getattr(metadata, "true_vocab_size", None),
        max_position_embeddings=metadata.max_position_embeddings,
        norm_epsilon=get("norm_epsilon", None) or get("layernorm_epsilon", 1e-5),
        normalization="RMSNorm" if rms else "LayerNorm",
        activation="swiglu" if swiglu else "gelu",
        position_embedding_type=get("position_embedding_type", "rope"),
        rotary_base=float(get("rotary_base", 10000)),
        rotary_percent=get("rotary_percent", 1.0),
        add_bias_linear=bool(getattr(metadata, "linear_bias", False)),
        add_qkv_bias=bias,
        qk_layernorm=qk_norm,
        tied=not getattr(metadata, "output_layer", True),
        dtype=str(getattr(metadata, "params_dtype", "bfloat16")).removeprefix("torch."),
        num_experts=experts,
        moe_ffn_hidden_size=shapes.get("mlp l1 weight", (None,))[-1] if experts else None,
        moe_router_topk=get("moe_router_topk", 2),
    )


def metadata_of(begin: Begin, model_type: str) -> SimpleNamespace:
    """Return the metadata namespace that Megatron's own loaders put first."""
    import torch

    spec = begin.parts.get("language") or next(iter(begin.parts.values()))
    training = dict(begin.training)
    args = argparse.Namespace(**_arguments(spec, begin))
    iteration = training.get("iteration", 0)
    own = ("seq_length", "tokenizer_type", "bert_binary_head", "make_vocab_size_divisible_by")
    dimensions = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")
    positions = ("max_position_embeddings", "position_embedding_type")
    return SimpleNamespace(
        **{name: getattr(spec, name) for name in (*dimensions, *positions)},
        **{name: getattr(args, name) for name in own},
        model_type=model_type,
        iteration=iteration if isinstance(iteration, int) else 0,
        params_dtype=getattr(torch, spec.dtype),
        output_layer=not spec.tied,
        linear_bias=spec.add_bias_linear,
        qkv_bias=spec.add_bias_linear or spec.add_qkv_bias,
        norm_has_bias=spec.normalization == "LayerNorm",
        swiglu=spec.gated,
        previous_tensor_parallel_size=begin.parallel.get("tp", 1),
        previous_pipeline_parallel_size=begin.parallel.get("pp", 1),
        true_vocab_size=spec.vocab_size,
        checkpoint_args=args,
        consumed_train_samples=training.get("consumed_train_samples", 0),
        consumed_valid_samples=training.get("consumed_valid_samples", 0),
        use_legacy_models=False,
        num_experts=args.num_experts or 0,
    )


_SAME_NAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "max_position_embeddings", "position_embedding_type", "rotary_base"),
    *("rotary_percent", "normalization", "norm_epsilon", "add_bias_linear", "add_qkv_bias"),
    *("qk_layernorm", "num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
)
"""Dimensions of a `ModelSpec` that Megatron's args have under the same name."""


def _arguments(spec: ModelSpec, begin: Begin) -> dict[str, Any]:
    """Return Megatron's ``args`` of the source: its own where it has them, else from the spec."""
    derived = {
        **{name: getattr(spec, name) for name in _SAME_NAME},
        "group_query_attention": spec.num_query_groups != spec.num_attention_heads,
        "seq_length": spec.max_position_embeddings,
        "swiglu": spec.gated,
        "untie_embeddings_and_output_weights": not spec.tied,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "HuggingFaceTokenizer",
        "bert_binary_head": False,
        "sequence_parallel": False,
        "apply_query_key_layer_scaling": False,
        "fp16": spec.dtype == "float16",
        "bf16": spec.dtype == "bfloat16",
    }
    own = begin.training.get("args")
    values = vars(own) if hasattr(own, "__dict__") else own
    return {**derived, **(values or {})}


def _training(metadata: Any) -> dict[str, Any]:
    found = {
        name: getattr(metadata, name)
        for name in ("iteration", "consumed_train_samples", "consumed_valid_samples")
        if getattr(metadata, name, None) is not None
    }
    args = getattr(metadata, "checkpoint_args", None)
    return {**found, **({"args": plain(args)} if args is not None else {})}


def _lookup(metadata: Any, args: Any) -> Callable[[str, Any], Any]:
    def get(name: str, default: Any) -> Any:
        for place in (metadata, args):
            if getattr(place, name, None) is not None:
                return getattr(place, name)
        return default

    return get


def _groups(fused: Shape | None, heads: int, channels: int, get: Callable[[str, Any], Any]) -> int:
    if fused is not None:  # [(heads + 2 * groups) * channels, hidden]
        return (fused[0] // channels - heads) // 2
    return int(get("num_query_groups", heads)) if get("group_query_attention", False) else heads
