"""Block-quantised weights of a Hugging Face model: ``X.weight`` in float8, ``X.weight_scale_inv``.

Every block of a matrix has one scale, by which its values are multiplied, whatever the name says.

Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md @ main; huggingface/transformers
src/transformers/integrations/finegrained_fp8.py @ v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptx.errors import SchemaError, listing
from ckptx.tensors.dtypes import DTYPES, FLOAT8, dtype_name
from ckptx.tensors.lazy import LazyTensor
from ckptx.tensors.operations import dequantised

KEY = "quantization_config"
"""The entry of ``config.json``."""
SCALE = "_scale_inv"
"""What is added to the name of a quantised tensor for that of its scale."""
_SCALES = ("float32", "bfloat16", "float16")


def dequantise(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], dtype: str | None = None
) -> dict[str, LazyTensor]:
    """Return the tensors with quantised ones in ``dtype``, by default the config's, and no scales.

    Raises:
        SchemaError: the config names another quantisation, a scale is missing or left over, or has
            not the shape that its tensor and the config's block size say.
    """
    scales = {name for name in tensors if name.endswith(SCALE)}
    said = config.get(KEY)
    quantised = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8]
    if not (said or scales or quantised):
        return dict(tensors)
    block = _block(said, [*quantised, *scales])
    target = _target(config, dtype)
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE)
        if name in scales:
            _check_scale(name, tensor, tensors.get(name.removesuffix(SCALE)))
        elif tensor.dtype not in FLOAT8:
            found[name] = tensor
        elif scale is None:
            raise SchemaError(
                f"{name!r} is {tensor.dtype} and has no {name + SCALE!r}: without its scales it "
                "cannot be read; copy the shard that holds them"
            )
        else:
            try:
                found[name] = dequantised(tensor, scale, block, target)
            except SchemaError as error:
                raise SchemaError(f"{name + SCALE!r}: {error}") from error
    return found


def _check_scale(name: str, scale: LazyTensor, weight: LazyTensor | None) -> None:
    owner = name.removesuffix(SCALE)
    if weight is None:
        raise SchemaError(f"{name!r} is a scale without {owner!r}; copy the shard that holds it")
    if weight.dtype not in FLOAT8:
        raise SchemaError(
            f"{owner!r} is {weight.dtype}, which is not quantised, and has a scale {name!r}: they "
            "are not of one model"
        )
    if scale.dtype not in _SCALES:
        raise SchemaError(f"{name!r} is {scale.dtype}, expected {' or '.join(_SCALES)}")


def _block(said: Any, names: list[str]) -> tuple[int, int]:
    """Return the rows and columns of a block that a config says."""
    if said is None:
        raise SchemaError(
            f"{listing(names)}: quantised, but the config has no {KEY} with a weight_block_size; "
            "copy the model's own config.json"
        )
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if method != "fp8":
        raise SchemaError(
            f"{KEY}: quant_method {method!r} is not known, only 'fp8' with one scale for every "
            "block; dequantise the model with the tool that made it"
        )
    block = said.get("weight_block_size")
    whole = isinstance(block, list | tuple) and len(block) == 2
    if not whole or not all(isinstance(size, int) and size > 0 for size in block):
        raise SchemaError(f"{KEY}: weight_block_size {block!r}, expected rows and columns")
    return block[0], block[1]


def _target(config: Mapping[str, Any], dtype: str | None) -> str:
    if dtype is not None:
        return dtype_name(dtype)
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return named if named in DTYPES else "bfloat16"
