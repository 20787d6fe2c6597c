"""Which framework runs a checkpoint, and what has to be done to it before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptx.conversion.request import ConversionRequest
from ckptx.errors import FormatError, PlanError
from ckptx.protocol.messages import Begin
from ckptx.protocol.sidecars import CONFIG
from ckptx.registry import registry
from ckptx.registry.families import family_named
from ckptx.registry.source import Source
from ckptx.text.plain import plain
from ckptx.verification.frameworks import child

_HF = ("hf", "hf_llava")
_LESS = "so this proves less than running what its own framework writes"


@dataclass(frozen=True, slots=True)
class Backend:
    """A checkpoint that can be run: ``module`` of this package, with ``job``."""

    module: str
    framework: str
    directory: Path
    vocab_size: int
    """Rows of the vocabulary that are known to be real."""
    job: Mapping[str, Any] = field(default_factory=dict)
    special: frozenset[int] = frozenset()
    """Tokens that stand for images and the like: random text has none of them."""
    longest: int | None = None
    """The most tokens a sequence may have."""
    notes: tuple[str, ...] = ()
    instead: Callable[[str], Backend] | None = None
    """How the checkpoint is run for the reason for which ``module`` has refused it, if at all."""


def prepare(source: Source, scratch: Path, letter: str) -> Backend:
    """Return how a checkpoint is run; what must be converted first is, below ``scratch``.

    Raises:
        CkptxError: it cannot be read, converted, or run by an installed framework.
    """
    path = source.path
    name = registry.canonical(source.format) if source.format else registry.detect(path)
    source = replace(source, format=name)
    if name in _HF:
        return _transformers(path)
    if name == "deepspeed":
        return _deepspeed(source, scratch, letter)
    if name not in ("core", "legacy"):
        return _converted_to_hf(source, scratch, letter, "")
    begin = _begin(source)
    spec = begin.parts["language"]
    if "vision" in begin.parts:
        return _converted_to_hf(source, scratch, letter, "its model takes images")
    if spec.multi_latent_attention:
        why = "latent attention needs Transformer Engine in Megatron"
        return _converted_to_hf(source, scratch, letter, why)
    if not family_named(spec.family).megatron.decoder:
        raise PlanError(f"{path}: --logits compares models that predict the next token, not BERT")
    child.require("megatron.core", f"{path}: a Megatron checkpoint")
    if begin.parallel.get("ckpt_format") == "torch_dist":
        return _megatron(begin)
    target = scratch / f"{letter}-core"
    _convert(source, "core", target)
    note = (
        f"{letter.upper()}: Megatron loads this form in a job of its own size only; run as "
        f"torch_dist, which ckptx has made of it, {_LESS}"
    )
    side = _megatron(_begin(Source(target, "core")))
    return replace(side, notes=(note, *side.notes))


def _begin(source: Source) -> Begin:
    """Return the metadata of a checkpoint; its pickles have been read without executing them."""
    with source.open() as checkpoint:
        if checkpoint.misfit is not None:
            raise FormatError(str(checkpoint.misfit))
        return checkpoint.begin


def _deepspeed(source: Source, scratch: Path, letter: str) -> Backend:
    """Return how DeepSpeed's own gatherer and transformers run a checkpoint; else it is converted.

    It is opened by ckptx first, so that what its unpickler refuses never comes to DeepSpeed.
    """

    def converted(reason: str) -> Backend:
        return _converted_to_hf(source, scratch, letter, reason)

    begin = _begin(source)
    if not child.installed("deepspeed"):
        return converted("deepspeed is not installed: pip install 'ckptx[deepspeed]'")
    model = scratch / f"{letter}-model"
    model.mkdir()
    for name, data in begin.sidecars.items():
        (model / name).write_bytes(data)
    tag = Path(begin.root).absolute()
    return replace(
        _transformers(model, source.path),
        module="deepspeed_side",
        framework="DeepSpeed's gatherer and transformers",
        job={"directory": str(model), "root": str(tag.parent), "tag": tag.name},
        instead=lambda reason: converted(f"DeepSpeed's own gatherer refuses it: {reason}"),
    )


def _transformers(
    directory: Path, given: Path | None = None, notes: tuple[str, ...] = ()
) -> Backend:
    """Return how transformers runs a directory that was ``given``, or made of what was."""
    given = given or directory
    child.require("transformers", f"{given}: a Hugging Face model")
    file = directory / CONFIG
    if not file.is_file():
        raise FormatError(f"{given}: holds no {CONFIG}, so no model can be built; give --hf-base")
    try:
        config = json.loads(file.read_bytes())
        text = config.get("text_config") or config
        vocab_size = int(text.get("vocab_size") or config["vocab_size"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{file}: names no vocab_size: {error}") from error
    special = frozenset(
        value
        for name, value in config.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    )
    job = {"directory": str(directory.resolve())}
    side, framework = "transformers_side", "transformers"
    return Backend(side, framework, directory, vocab_size, job, special, notes=notes)


def _megatron(begin: Begin) -> Backend:
    spec = begin.parts["language"]
    args = plain(begin.training["args"])
    notes: list[str] = []
    scale = longest = None
    if spec.extra.get("scale_embeddings"):
        scale = spec.hidden_size**0.5
        notes.append(
            f"embeddings are multiplied by {scale:g}, as {spec.architecture} does; Megatron's own "
            "GPTModel does not"
        )
    if window := args.pop("window_size", None):
        # Megatron's local layers make the mask of a window on a GPU; shorter texts need none.
        longest = int(window[0]) + 1
    if spec.mtp_num_layers:
        notes.append("layers for multi-token prediction are not run")
    return Backend(
        "megatron_side",
        "megatron-core on a CPU",
        Path(begin.root),
        spec.vocab_size or int(args["padded_vocab_size"]),
        {"directory": begin.root, "args": args, "embedding_scale": scale},
        longest=longest,
        notes=tuple(notes),
    )


def _converted_to_hf(source: Source, scratch: Path, letter: str, why: str) -> Backend:
    target = scratch / f"{letter}-hf"
    _convert(source, "hf", target)
    made = f"the directory that ckptx has made of {source.format}{f' ({why})' if why else ''}"
    note = f"{letter.upper()}: run by transformers from {made}, {_LESS}"
    return _transformers(target, source.path, (note,))


def _convert(source: Source, saver: str, target: Path) -> None:
    from ckptx.conversion import supervisor

    assert source.format is not None  # detected by now
    request = ConversionRequest(
        *(source.format, saver, source.path, target, source.options),
        {"no_config": True},  # whoever runs the model misses it
        hf_base=source.hf_base,
    )
    supervisor.convert(request)
