"""What a LLaVA in Megatron's checkpoints needs besides what a GPT model needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptx.errors import PlanError, SchemaError
from ckptx.model import pipeline_parallel
from ckptx.model.canonical_names import VISION_LAYER
from ckptx.model.layout import Parts
from ckptx.model.pipeline_parallel import Chunk, Pipeline
from ckptx.model.spec import ModelSpec
from ckptx.plugins.megatron.source import Source
from ckptx.protocol.messages import Dropped, Tensors
from ckptx.protocol.model import Model, leave_unused
from ckptx.registry.families import family_named
from ckptx.schemas.megatron_settings import llava as llava_args
from ckptx.schemas.megatron_settings.args import NOTE
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, LazyTensor

FAMILY = "llava"
SCRIPT = "examples/multimodal/train.py"
"""What of Megatron trains such a model."""
# Where InternViT's heads are: the axis, and how many rows or columns a head has.
_HEADS = {
    "qkv weight": (0, 3),
    "q norm weight": (0, 1),
    "k norm weight": (0, 1),
    "dense weight": (1, 1),
}


def parts_of(
    checkpoint: Source, config: Parts | None, language: ModelSpec
) -> tuple[dict[str, ModelSpec], int]:
    """Return the dimensions of all parts, and how many heads of InternViT count for nothing."""
    args = checkpoint.args
    stages = args.get("encoder_pipeline_model_parallel_size")
    size = args.get("encoder_tensor_model_parallel_size")
    if stages or (size and size != (args.get("tensor_model_parallel_size") or 1)):
        raise SchemaError(
            f"{checkpoint.place}: the tower has parallel sizes of its own (encoder_tensor_model_"
            f"parallel_size {size}, encoder_pipeline_model_parallel_size {stages}), which ckptx "
            "does not read; save it again with the language model's"
        )
    try:
        vision = llava_args.vision_parts(args, checkpoint.weights, checkpoint.cut, config, language)
    except SchemaError as error:
        raise SchemaError(f"{checkpoint.place}: {error}") from error
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    width = llava_args.Shapes(shapes, checkpoint.cut).width()
    tower = vision["vision"]
    dummies = width // tower.kv_channels - tower.num_attention_heads
    parts = {**vision, "language": language}
    return {part: replace(spec, dtype=checkpoint.dtype) for part, spec in parts.items()}, dummies


def stored_parts(parts: Parts, dummies: int) -> Parts:
    """Return the parts as a checkpoint stores them: with the heads that count for nothing."""
    tower = parts["vision"]
    heads = tower.num_attention_heads + dummies
    return {**parts, "vision": llava_args.with_heads(tower, heads)}


def without_dummies(
    messages: Iterable[Tensors], tower: ModelSpec, dummies: int, dropped: list[Dropped]
) -> Iterator[Tensors]:
    """Yield the messages without the heads that count for nothing; add what was cut."""
    for message in messages:
        if not dummies or not message.name.startswith(VISION_LAYER):
            yield message
            continue
        changed = dict(message.tensors)
        for key, (axis, each) in _HEADS.items():
            if key not in changed:
                continue
            tensor, true = changed[key], tower.num_attention_heads * tower.kv_channels * each
            changed[key] = tensor.narrow(axis, 0, true)
            cut = tensor.narrow(axis, true, tensor.shape[axis])
            label = f"{message.name}: {key!r} of {dummies} heads"
            dropped.append(Dropped(label, "dummy heads, which Megatron zeroes", cut.nbytes, (cut,)))
        yield replace(message, tensors=changed)


def with_dummies(model: Model, tp: int) -> tuple[str, ...]:
    """Pad the heads of an InternViT tower so that they divide over ranks; say so if it was needed.

    Source: NVIDIA/Megatron-LM examples/multimodal/config.py, get_vision_model_config, and
    examples/multimodal/model_converter/internvit_converter.py @ core_v0.16.1.
    """
    tower = model.parts["vision"]
    dummies = -tower.num_attention_heads % tp
    if tower.family != "internvit" or not dummies:
        return ()
    for name, tensors in model.messages.items():
        if not name.startswith(VISION_LAYER):
            continue
        changed = dict(tensors)
        for key, (axis, each) in _HEADS.items():
            changed[key] = _padded(tensors[key], axis, dummies * tower.kv_channels * each)
        model.messages[name] = changed
    model.begin = replace(model.begin, parts=stored_parts(model.parts, dummies))
    note = (
        f"{tower.num_attention_heads} heads of internvit do not divide over tensor-parallel size "
        f"{tp}: as Megatron's examples expect, heads of zeros were added, {dummies} of them"
    )
    return (note,)


def _padded(tensor: LazyTensor, axis: int, count: int) -> LazyTensor:
    shape = tuple(count if place == axis else n for place, n in enumerate(tensor.shape))
    return concat([tensor, Filled(tensor.dtype, shape)], axis)


def prepare(
    model: Model, tp: int, pipeline: Pipeline
) -> tuple[tuple[Dropped, ...], tuple[str, ...]]:
    """Make a model what Megatron's LLaVAModel can hold; return what was left out, and remarks.

    Raises:
        SchemaError: it cannot be one.
        PlanError: ``tp`` does not divide a part, or there are virtual stages.
    """
    if any(chunk.vpp_rank for chunk in pipeline.chunks(model.spec.num_layers)):
        raise PlanError(
            "virtual stages were asked for: Megatron's LLaVA has none "
            "(examples/multimodal/model.py, to core 0.16); give --vpp 1"
        )
    if problems := llava_args.unsupported_by_megatron(model.parts):
        raise SchemaError(f"Megatron's LLaVA cannot be: {'; '.join(problems)}")
    family = family_named(FAMILY)
    assert family.composition is not None  # it has several parts
    dropped = leave_unused(model, family)
    source = model.begin.training.get("args") or {}
    told = "vision_model_type" in source  # it was Megatron's before, and its code is as it must be
    notes = (*with_dummies(model, tp), *(() if told else llava_args.notes(model.parts)))
    tower, projection = model.parts["vision"], model.parts["projection"]
    for name, size in (
        ("the tower's num_attention_heads", tower.num_attention_heads),
        ("the tower's ffn_hidden_size", tower.ffn_hidden_size),
        ("the projection's ffn_hidden_size", projection.ffn_hidden_size),
    ):
        if size % tp:
            raise PlanError(f"tensor-parallel size {tp} does not divide {name} {size}")
    return dropped, notes


def describe(chunks: Sequence[Chunk]) -> list[str]:
    """Return one line per pipeline chunk; the first holds what sees."""
    first, *others = pipeline_parallel.describe(chunks)
    return [f"{first}, vision tower, projection", *others]


def launch_flags(args: Mapping[str, Any]) -> list[str]:
    """Return the options that a launch needs besides those of its language model."""
    flags = ["--language-model-type", str(args["language_model_type"])]
    flags += ["--vision-model-type", str(args["vision_model_type"])]
    for name in ("img_h", "img_w", "patch_dim", "decoder_seq_length"):
        if args.get(name):
            flags += [f"--{name.replace('_', '-')}", str(args[name])]
    for name in ("disable_vision_class_token", "pixel_shuffle", "use_te"):
        flags += [f"--{name.replace('_', '-')}"] * bool(args.get(name))
    return flags


def args_of_parts(
    parts: Parts, args: Mapping[str, Any], source: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return ``args`` of the language model with those of the other parts added."""
    note = args.get(NOTE) or {}
    use_te = args["transformer_impl"] == "transformer_engine"
    return {**args, **llava_args.llava_args(parts, source or {}, note), "use_te": use_te}
