"""Where the record starts: models of arithmetic values, and committed checkpoints.

No framework and no generator of random numbers is asked: what the record holds must depend on
nothing but the program. Values are small multiples of 1/64, exact in every dtype, float32 with
lower bits besides; sums of a few products of them are exact in any order.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .program import MIXTURES, MODELS, OLMOE, PADDED, TinyModel, tiny_model

HERE = Path(__file__).parent
FAMILIES = HERE / "families.json"
MADE = HERE / "made.tar.xz"
GOLDEN = HERE.parent / "golden" / "deepspeed"
DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
}
CODES = {np.dtype(dtype).name: code for code, dtype in DTYPES.items()}
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_query_groups": 4,
    "ffn_hidden_size": 88,
    "vocab_size": 40,
}
FOR_META = (
    tiny_model("llama", "meta-llama", **SIZES, kv_channels=4),
    tiny_model("llama", "meta-tied", **SIZES, kv_channels=4, tied=True),
    tiny_model("mistral", "meta-mistral", **SIZES, kv_channels=6),
)
"""Models that Meta's layout can hold."""
KIT = {str(model): model for model in (*MODELS, *MIXTURES, OLMOE, *PADDED, *FOR_META)}


def tiny(name: str) -> TinyModel:
    """Return a model of the kit by its name, or one made for it."""
    return KIT[name] if name in KIT else tiny_model(name)


def values(name: str, dtype: str, shape: Sequence[int], salt: str = "") -> np.ndarray:
    """Return the values of a tensor; equal names have equal values."""
    seed = zlib.crc32(f"{salt}{name}".encode())
    index = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64)
    steps = (index * (2 * (seed % 251) + 1) + seed % 509) % 509 - 254
    if dtype == "I64":
        return steps.reshape(tuple(shape))
    found = steps.astype(np.float64) / 64
    if dtype == "F32":
        found += (index * 7919 + seed) % 8191 / 2**22
    return found.astype(DTYPES[dtype]).reshape(tuple(shape))


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in arrays.items():
        span = [position, position + array.nbytes]
        code = CODES[array.dtype.name]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refill(directory: Path, file: str = "model.safetensors", salt: str = "") -> Path:
    """Give the tensors of a safetensors file arithmetic values; return the directory."""
    raw = (directory / file).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    arrays = {n: values(n, t["dtype"], t["shape"], salt) for n, t in sorted(header.items())}
    write_safetensors(directory / file, arrays)
    return directory


def write_hf(
    directory: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shards: int = 1
) -> Path:
    """Write a model directory, with a file that stands for a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "tokenizer.json").write_text('{"version": "record"}\n')
    if shards == 1:
        write_safetensors(directory / "model.safetensors", arrays)
        return directory
    homes = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: arrays[key] for key in list(arrays)[number::shards]}
        write_safetensors(directory / name, part)
        homes |= dict.fromkeys(part, name)
    size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _kit(name: str, dtype: str = "BF16", shards: int = 1) -> Callable[[Path], Path]:
    """Return a writer of a model of the kit."""

    def write(directory: Path) -> Path:
        model = KIT[name]
        named = {key: values(key, dtype, array.shape) for key, array in model.hf().items()}
        said = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
        return write_hf(directory, {**model.config(), "torch_dtype": said}, named, shards)

    return write


def _family(name: str, code: str | None = None, **changes: Any) -> Callable[[Path], Path]:
    """Return a writer of a model of ``families.json``."""

    def write(directory: Path) -> Path:
        said = json.loads(FAMILIES.read_text())[name]
        named = {}
        for key, text in said["tensors"].items():
            kind, *shape = text.split()
            kind = code if code and kind.startswith(("F", "BF")) else kind
            same = re.sub(r"^model\.layers\.\d+\.embed_tokens\.", "model.embed_tokens.", key)
            same = re.sub(r"^model\.layers\.\d+\.shared_head\.head\.", "lm_head.", same)
            named[key] = values(same, kind, [int(size) for size in shape])
        return write_hf(directory, {**said["config"], **changes}, named)

    return write


def _quantised(directory: Path) -> Path:
    """Write a Qwen3 whose linear layers are float8, in blocks of 24 by 16."""
    said = json.loads(FAMILIES.read_text())["qwen3"]
    named = {}
    for key, text in said["tensors"].items():
        _, *sizes = text.split()
        shape = [int(size) for size in sizes]
        linear = "proj" in key and key.endswith("weight")
        named[key] = values(key, "F8_E4M3" if linear else "BF16", shape)
        if linear:
            grid = [-(-size // part) for size, part in zip(shape, (24, 16), strict=True)]
            named[f"{key}_scale_inv"] = np.exp2(values(key, "I64", grid) % 4 - 8.0).astype(
                np.float32
            )
    quantised = {"quant_method": "fp8", "weight_block_size": [24, 16]}
    return write_hf(
        directory, {**said["config"], "quantization_config": quantised, "dtype": "bfloat16"}, named
    )


def _headed(directory: Path) -> Path:
    """Write a Llama with a score in place of its output layer."""
    said = json.loads(FAMILIES.read_text())["llama"]
    named = {}
    for key, text in said["tensors"].items():
        kind, *shape = text.split()
        if key != "lm_head.weight":
            named[key] = values(key, kind, [int(size) for size in shape])
    named["score.weight"] = values("score.weight", "F32", [1, said["config"]["hidden_size"]])
    architecture = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    return write_hf(directory, {**said["config"], **architecture}, named)


def _swapped(one: str, other: str) -> Callable[[Path], Path]:
    """Return a writer of a Llama in which two kinds of tensors have changed places."""

    def write(directory: Path) -> Path:
        model = KIT["llama"]
        named = {key: values(key, "BF16", array.shape) for key, array in model.hf().items()}
        found = {
            key: named[key.replace(one, other) if one in key else key.replace(other, one)]
            for key in named
        }
        return write_hf(directory, model.config(), found)

    return write


def _made(name: str) -> Callable[[Path], Path]:
    """Return a writer of one of the committed checkpoints."""

    def write(directory: Path) -> Path:
        with tarfile.open(MADE) as archive:
            below = [m for m in archive.getmembers() if f"{m.name}/".startswith(f"{name}/")]
            for member in below:  # of a training run, its step
                own = member.name.removeprefix(name).lstrip("/")
                member.name = re.sub(r"^global_step_\d+/?", "", own) or "."
            archive.extractall(directory, below, filter="data")
        return directory

    return write


@cache
def made() -> list[str]:
    """Return the names of the committed checkpoints."""
    with tarfile.open(MADE) as archive:
        return sorted({"/".join(m.name.split("/")[:2]) for m in archive if "/" in m.name})


def _golden(name: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        directory.mkdir(parents=True)
        for path in sorted((GOLDEN / name).rglob("*")):
            copy = directory / path.relative_to(GOLDEN / name)
            if path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        return directory

    return write


def golden() -> list[str]:
    """Return the names of the golden checkpoints."""
    return sorted(p.name for p in GOLDEN.iterdir() if any(p.glob("global_step*")))


def large(directory: Path) -> Path:
    """Write a Llama of 4 MB, whose conversion lasts long enough to be killed."""
    sizes = {"hidden_size": 128, "ffn_hidden_size": 512, "kv_channels": 16, "vocab_size": 2048}
    model = tiny_model("llama", "large", **sizes)
    named = {key: values(key, "BF16", array.shape) for key, array in model.hf().items()}
    return write_hf(directory, model.config(), named)


@cache
def all_sources() -> dict[str, Callable[[Path], Path]]:
    """Return every source by name; each writes itself to a directory that does not exist."""
    found: dict[str, Callable[[Path], Path]] = {f"kit/{name}": _kit(name) for name in KIT}
    found["kit/llama-fp32"] = _kit("llama", "F32")
    found["kit/llama-fp16-3-shards"] = _kit("llama", "F16", 3)
    families = json.loads(FAMILIES.read_text())
    found |= {f"family/{name}": _family(name) for name in families}
    found["family/qwen3-moe-bf16"] = _family("qwen3-moe", "BF16", dtype="bfloat16")
    found["family/deepseek-v3-bf16"] = _family("deepseek-v3", "BF16", dtype="bfloat16")
    found["wrong/gate-for-up"] = _swapped("gate_proj", "up_proj")
    found["wrong/layers"] = _swapped("layers.1.", "layers.3.")
    found["wrong/key-for-value"] = _swapped("k_proj", "v_proj")
    found["family/quantised"] = _quantised
    found["family/headed"] = _headed
    found |= {f"made/{name}": _made(name) for name in made()}
    found |= {f"golden/{name}": _golden(name) for name in (*golden(), "model")}
    return found
