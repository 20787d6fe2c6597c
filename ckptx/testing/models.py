"""Tiny models of tagged weights, and source directories and messages made of them by hand.

Nothing here asks a schema, a config table or a container of ckptx: names, shapes, the fused order
of query, key and value, and the bytes of safetensors are spelt out anew, so that what a plugin does
can be compared with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptx.model.spec import ModelSpec
from ckptx.protocol.messages import PASSTHROUGH, Begin, End, Message, SourceTensor, Tensors
from ckptx.tensors.lazy import LazyTensor, stored
from ckptx.testing.tagged import tagged

Arrays: TypeAlias = dict[str, NDArray[Any]]
Canonical: TypeAlias = dict[str, Arrays]
"""Arrays by message and key."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gpt": "GPTModel",
}
_EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_SAFETENSORS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model of a few thousand parameters.

    ``rows`` are those of the embedding where it is padded, ``norm_dtype`` the dtype of norms where
    it is not that of the rest.
    """

    name: str
    spec: ModelSpec
    rows: int | None = None
    norm_dtype: str | None = None

    def __str__(self) -> str:
        """Return the name, which pytest shows."""
        return self.name

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding without padding."""
        assert self.spec.vocab_size is not None, "tiny models know their vocabulary"
        return self.spec.vocab_size

    def hf(self) -> Arrays:
        """Return the weights under the names of Llama's relatives, in no particular order."""
        return dict(self._named(self.vocabulary))

    def canonical(self, *, padded: bool = True) -> Canonical:
        """Return the same weights as messages hold them; query, key and value fused with numpy."""
        named = dict(self._named(self.rows if padded and self.rows else self.vocabulary))
        messages: Canonical = {
            "embeddings": {"word embeddings": named["model.embed_tokens.weight"]}
        }
        if self.spec.position_embedding_type == "learned_absolute":
            messages["embeddings"]["position embeddings"] = named["model.embed_positions.weight"]
        for layer in range(self.spec.num_layers):
            prefix = f"model.layers.{layer}."
            own = {n.removeprefix(prefix): a for n, a in named.items() if n.startswith(prefix)}
            found = {**dict(self._layer(own)), **dict(self._mixture(own))}
            messages[f"transformer layer {layer}"] = found
        final = {"weight": named["model.norm.weight"]}
        if "model.norm.bias" in named:
            final["bias"] = named["model.norm.bias"]
        messages["final norm"] = final
        if not self.spec.tied:
            messages["output layer"] = {"weight": named["lm_head.weight"]}
        return messages

    def config(self) -> dict[str, Any]:
        """Return the model's ``config.json``, as transformers 4 spells it."""
        spec = self.spec
        config: dict[str, Any] = {
            "architectures": [spec.architecture],
            "model_type": spec.family,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.ffn_hidden_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_attention_heads,
            "num_key_value_heads": spec.num_query_groups,
            "head_dim": spec.kv_channels,
            "vocab_size": spec.vocab_size,
            "max_position_embeddings": spec.max_position_embeddings,
            "rms_norm_eps": spec.norm_epsilon,
            "rope_theta": spec.rotary_base,
            "tie_word_embeddings": spec.tied,
            "hidden_act": "silu",
            "torch_dtype": spec.dtype,
        }
        if spec.family == "llama":
            config |= {"attention_bias": spec.add_bias_linear, "mlp_bias": spec.add_bias_linear}
        if spec.family in ("mistral", "mixtral"):
            config["sliding_window"] = None
        return config | (self._mixture_config() if spec.num_experts else {})

    def _mixture_config(self) -> dict[str, Any]:
        spec = self.spec
        count = "num_local_experts" if spec.family == "mixtral" else "num_experts"
        config: dict[str, Any] = {count: spec.num_experts}
        config["num_experts_per_tok"] = spec.moe_router_topk
        if spec.family != "mixtral":
            config["norm_topk_prob"] = not spec.moe_router_pre_softmax
        if spec.family.startswith("qwen"):
            dense = [layer for layer in range(spec.num_layers) if not spec.is_moe(layer)]
            config |= {"moe_intermediate_size": spec.moe_ffn_hidden_size, "mlp_only_layers": dense}
        if spec.moe_shared_expert_gate:
            config["shared_expert_intermediate_size"] = spec.moe_shared_expert_intermediate_size
        return config

    def _named(self, rows: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield every tensor under a name of Llama's manner, which also seeds its tags."""
        spec, hidden = self.spec, self.spec.hidden_size
        yield from self._tag("model.embed_tokens", [rows, hidden])
        if spec.position_embedding_type == "learned_absolute":
            yield from self._tag("model.embed_positions", [spec.max_position_embeddings, hidden])
        every = spec.add_bias_linear
        query = spec.num_attention_heads * spec.kv_channels
        key = spec.num_query_groups * spec.kv_channels
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}."
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            for part, size in (("q", query), ("k", key), ("v", key)):
                name = f"{attention}{part}_proj"
                yield from self._tag(name, [size, hidden], bias=every or spec.add_qkv_bias)
            yield from self._tag(f"{attention}o_proj", [hidden, query], bias=every)
            if spec.qk_layernorm:
                yield from self._norm(f"{attention}q_norm", spec.kv_channels)
                yield from self._norm(f"{attention}k_norm", spec.kv_channels)
            if spec.family == "olmoe":
                yield from self._norm(f"{attention}q_norm", query)
                yield from self._norm(f"{attention}k_norm", key)
            yield from self._norm(f"{prefix}input_layernorm", hidden)
            yield from self._norm(f"{prefix}post_attention_layernorm", hidden)
            if spec.is_moe(layer):
                yield from self._experts(prefix)
                continue
            for part in ("gate_proj", "up_proj") if spec.gated else ("up_proj",):
                yield from self._tag(mlp + part, [spec.ffn_hidden_size, hidden], bias=every)
            yield from self._tag(f"{mlp}down_proj", [hidden, spec.ffn_hidden_size], bias=every)
        yield from self._norm("model.norm", hidden)
        if not spec.tied:
            yield from self._tag("lm_head", [rows, hidden])

    def _experts(self, prefix: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the tensors of a mixture, named as its family's files name them."""
        spec, hidden = self.spec, self.spec.hidden_size
        count, ffn = spec.num_experts or 0, spec.moe_ffn_hidden_size or 0
        place = prefix + ("block_sparse_moe." if spec.family == "mixtral" else "mlp.")
        gate, up, down = _EXPERT_PARTS[spec.family == "mixtral"]
        yield from self._tag(f"{place}gate", [count, hidden])
        sizes = [(f"{place}experts.{expert}.", ffn) for expert in range(count)]
        if spec.moe_shared_expert_intermediate_size:
            sizes.append((f"{place}shared_expert.", spec.moe_shared_expert_intermediate_size))
        for name, size in sizes:
            yield from self._tag(name + gate, [size, hidden])
            yield from self._tag(name + up, [size, hidden])
            yield from self._tag(name + down, [hidden, size])
        if spec.moe_shared_expert_gate:
            yield from self._tag(f"{place}shared_expert_gate", [1, hidden])

    def _mixture(self, own: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the canonical tensors of a mixture, given a layer's tensors without prefix."""
        place = "block_sparse_moe." if self.spec.family == "mixtral" else "mlp."
        if f"{place}gate.weight" not in own:
            return
        yield "router weight", own[f"{place}gate.weight"]
        parts = _EXPERT_PARTS[self.spec.family == "mixtral"]
        for key, part in zip(("l0 weight W", "l0 weight V", "l1 weight"), parts, strict=True):
            experts = range(self.spec.num_experts or 0)
            every = [own[f"{place}experts.{expert}.{part}.weight"] for expert in experts]
            yield f"mlp {key}", np.stack(every)
            if f"{place}shared_expert.{part}.weight" in own:
                yield f"shared mlp {key}", own[f"{place}shared_expert.{part}.weight"]
        if f"{place}shared_expert_gate.weight" in own:
            yield "shared gate weight", own[f"{place}shared_expert_gate.weight"]

    def _tag(
        self, name: str, shape: list[int], *, bias: bool = False
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        yield f"{name}.weight", tagged(f"{name}.weight", self.spec.dtype, shape)
        if bias:
            yield f"{name}.bias", tagged(f"{name}.bias", self.spec.dtype, shape[:1])

    def _norm(self, name: str, size: int) -> Iterator[tuple[str, NDArray[Any]]]:
        kinds = ("weight", "bias") if self.spec.normalization == "LayerNorm" else ("weight",)
        for kind in kinds if "self_attn" not in name else ("weight",):
            dtype = self.norm_dtype or self.spec.dtype
            yield f"{name}.{kind}", tagged(f"{name}.{kind}", dtype, [size])

    def _layer(self, own: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the canonical tensors of a layer, given its tensors without their prefix."""
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in own:
                yield f"qkv {kind}", self._fused([own[f"self_attn.{p}_proj.{kind}"] for p in "qkv"])
        normed = "projection norm" if self.spec.family == "olmoe" else "norm"
        gate, up = ("mlp l0 {} W", "mlp l0 {} V") if self.spec.gated else ("", "mlp l0 {}")
        names = {
            "self_attn.o_proj": "dense {}",
            "self_attn.q_norm": f"q {normed} {{}}",
            "self_attn.k_norm": f"k {normed} {{}}",
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": "mlp l1 {}",
            "input_layernorm": "input norm {}",
            "post_attention_layernorm": "post norm {}",
        }
        for name, key in names.items():
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in own:
                    yield key.format(kind), own[f"{name}.{kind}"]

    def _fused(self, parts: list[NDArray[Any]]) -> NDArray[Any]:
        """Return query, key and value, query group by query group."""
        groups = self.spec.num_query_groups
        rows = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(rows, axis=1).reshape(-1, *parts[0].shape[1:])


_EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}


def tiny(family: str = "llama", name: str | None = None, **changes: Any) -> TinyModel:
    """Return a model of a family; ``changes`` are fields of its spec, ``rows`` or ``norm_dtype``.

    Unless changed there are 4 layers, 8 heads in 2 groups, heads that do not add up to the hidden
    size, and a vocabulary of odd size, so that no dimension passes for another.
    """
    own = {key: changes.pop(key) for key in ("rows", "norm_dtype") if key in changes}
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 16,
        "ffn_hidden_size": 40,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "norm_epsilon": 1e-5,
    }
    families: dict[str, dict[str, Any]] = {
        "qwen2": {"add_qkv_bias": True},
        "qwen3": {"qk_layernorm": True},
        "mixtral": _EXPERTS | {"moe_ffn_hidden_size": 40},
        "qwen2_moe": _EXPERTS
        | {
            "add_qkv_bias": True,
            "moe_shared_expert_intermediate_size": 32,
            "moe_shared_expert_gate": True,
            "moe_router_pre_softmax": True,
        },
        "qwen3_moe": _EXPERTS | {"qk_layernorm": True},
        "olmoe": _EXPERTS | {"moe_ffn_hidden_size": 40, "kv_channels": 2},
        "gpt": {
            "normalization": "LayerNorm",
            "activation": "gelu",
            "add_bias_linear": True,
            "position_embedding_type": "learned_absolute",
        },
    }
    values |= families.get(family, {}) | changes
    spec = ModelSpec(family, _CLASSES[family], **values)
    return TinyModel(name or family, spec, **own)


_SIXTEEN = dict.fromkeys(("hidden_size", "ffn_hidden_size", "vocab_size"), 16)
_FOUR = dict.fromkeys(("num_attention_heads", "num_query_groups", "kv_channels"), 4)
SQUARE = tiny("llama", "square", num_layers=2, **_SIXTEEN, **_FOUR)
"""Square matrices throughout, and a fused attention of three equal parts."""

MODELS: Sequence[TinyModel] = (
    tiny("llama"),
    SQUARE,
    tiny("llama", "llama-biases", add_bias_linear=True, dtype="float32"),
    tiny(
        "llama",
        "llama-odd-heads",
        hidden_size=18,
        ffn_hidden_size=15,
        num_attention_heads=9,
        num_query_groups=3,
    ),
    tiny("llama", "llama-twelve-layers", num_layers=12, dtype="float16"),
    tiny("mistral", "mistral-one-group", num_query_groups=1, norm_dtype="float32"),
    tiny("qwen2", "qwen2-tied", tied=True, num_query_groups=8),
    tiny("qwen2", vocab_size=64),
    tiny("qwen3", kv_channels=6),
    tiny("qwen3", "qwen3-tied", tied=True, dtype="float32"),
)
"""One model for everything that can go wrong; a sample of families and shapes, not the product."""

MIXTURES: Sequence[TinyModel] = (
    tiny("mixtral"),
    tiny("qwen2_moe", moe_layers=(True, False, True, False)),
    tiny("qwen3_moe", tied=True),
    tiny("qwen3_moe", "qwen3_moe-dense-first", moe_layers=(False, True, True, True)),
)
"""Mixtures of experts, some with dense layers between."""

OLMOE = tiny("olmoe")
"""A mixture that Megatron Core cannot hold."""

PADDED: Sequence[TinyModel] = (
    tiny("llama", "llama-padded", rows=64),
    tiny("qwen2", "qwen2-tied-padded", rows=40, tied=True),
)
"""Models whose embeddings have more rows than their vocabulary."""


def divides(spec: ModelSpec, tp: int) -> bool:
    """Return whether Megatron can cut a model over ``tp`` ranks.

    A size above the number of query groups must be a multiple of it, and divide the fused rows.
    """
    groups = spec.num_query_groups
    return not (
        spec.num_attention_heads % tp
        or spec.ffn_hidden_size % tp
        or (groups % tp and (tp % groups or spec.qkv_rows % tp))
    )


def write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Write arrays to a safetensors file, in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in arrays.items():
        span = [position, position + array.nbytes]
        code = _SAFETENSORS[array.dtype.name]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": span}
        position = span[1]
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_safetensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of every tensor in the safetensors files of a directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, said in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = said["data_offsets"]
                data = content[start + first : start + last]
                found[name] = (said["dtype"], said["shape"], data)
    return found


def write_config(directory: Path, model: TinyModel) -> Path:
    """Write ``config.json`` and a stand-in for a tokenizer to a directory, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    (directory / "tokenizer.json").write_text('{"version": "tiny"}\n')
    return directory


def write_hf(directory: Path, model: TinyModel, shards: int = 1) -> Path:
    """Write a model directory as Hugging Face lays it out, and return it."""
    write_config(directory, model)
    arrays = model.hf()
    if shards == 1:
        write_safetensors(directory / "model.safetensors", arrays)
        return directory
    homes = {}
    for number in range(shards):
        path = directory / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in list(arrays)[number::shards]}
        write_safetensors(path, part)
        homes.update(dict.fromkeys(part, path.name))
    size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def lazy(path: Path, arrays: Mapping[str, NDArray[Any]], file: int = 0) -> dict[str, LazyTensor]:
    """Write arrays to a file, none of them aligned, and return the tensors that lie there."""
    tensors: dict[str, LazyTensor] = {}
    with path.open("wb") as stream:
        for name, array in arrays.items():
            stream.write(b"\xee" * (1 + stream.tell() % 2))
            tensors[name] = stored(file, stream.tell(), array.dtype.name, array.shape)
            stream.write(array.tobytes())
    return tensors


def messages(model: TinyModel, directory: Path, *, config: bool = True) -> list[Message]:
    """Return the messages of a model whose bytes are in a file of ``directory``.

    With ``config`` the model's ``config.json`` travels along, where the family has one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiny.bin"
    flat = {(m, k): array for m, keys in model.canonical().items() for k, array in keys.items()}
    tensors = lazy(path, {f"{message}: {key}": array for (message, key), array in flat.items()})
    told = config and model.spec.family != "gpt"
    begin = Begin(
        format="tiny",
        layout="canonical",
        parts={"language": model.spec},
        files=(str(path),),
        sources=tuple(SourceTensor(name, tensor) for name, tensor in tensors.items()),
        root=str(directory),
        sidecars={"config.json": json.dumps(model.config()).encode()} if told else {},
        training={"iteration": "release"},
    )
    found: list[Message] = [begin]
    for name, keys in model.canonical().items():
        found.append(Tensors(name, {key: tensors[f"{name}: {key}"] for key in keys}))
    return [*found, End()]


def passthrough_messages(
    arrays: Mapping[str, NDArray[Any]], directory: Path, layout: str = "hf"
) -> list[Message]:
    """Return the messages of a model that no schema knows, under the names it has."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiny.bin"
    tensors = lazy(path, arrays)
    sources = tuple(SourceTensor(name, tensor) for name, tensor in tensors.items())
    config = {"architectures": ["UnheardOfForCausalLM"], "model_type": "unheard-of"}
    beside = {"config.json": json.dumps(config).encode()}
    begin = Begin("tiny", layout, {}, (str(path),), sources, str(directory), beside)
    return [begin, Tensors(PASSTHROUGH, tensors), End()]


def without_family(model: TinyModel) -> TinyModel:
    """Return a model whose architecture no schema knows, as far as its config says."""
    spec = replace(model.spec, family="unheard-of", architecture="UnheardOfForCausalLM")
    return replace(model, spec=spec)
