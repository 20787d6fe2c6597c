"""A Hugging Face model directory: its small files, its config, the family that the config names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ckptx.errors import FormatError, SchemaError
from ckptx.hf_models import float8, task_heads
from ckptx.hf_models.lora import extract
from ckptx.hf_models.lora import merge as adapter_merge
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.export import exported
from ckptx.hf_models.spellings import with_old_keys
from ckptx.model.family import Family
from ckptx.model.layout import Parts
from ckptx.protocol.context import ADAPTERS, UNTOLD, Context
from ckptx.protocol.from_names import (
    begin_anyway,
    name_among,
    named_messages,
    names_held,
    passthrough,
    tied_names,
)
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Message
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import _architectures, family_of, parts_from_config, why_unknown
from ckptx.storage.location import Location
from ckptx.storage.partial import MANIFEST
from ckptx.storage.source_file import read_small
from ckptx.tensors.lazy import LazyTensor

_SUFFIXES = {".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_VOCABULARY = "vocab_size"
_TIE = "tie_word_embeddings"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT = "lm_head.weight"
"""What embedding and output layer are called in models that no schema knows."""
_ADAPTER_BESIDE = (
    f"{ADAPTER_CONFIG} is not carried: an adapter lies beside whole weights; if they do not hold "
    "it yet, --adapter merges it"
)
_MAX_SIDECAR = 64 << 20  # bytes; the largest published tokenizers have about 35 MB
Renamer = Callable[[Mapping[str, Any]], Callable[[str], str]]


_TRAINING = (
    *("optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin", "scaler.pt"),
    *("rng_state*.pth", "random_states_*.pkl", "training_args.bin", "trainer_state.json"),
    *("zero_to_fp32.py", "zero_to_torch.py"),
)
"""What ``Trainer``, ``Accelerator.save_state`` and DeepSpeed write beside the weights.

Source: transformers src/transformers/trainer.py @ v5.23.0, accelerate
src/accelerate/utils/constants.py @ v1.15.0, DeepSpeed deepspeed/runtime/engine.py @ v0.19.8, which
copies its scripts into every checkpoint.
"""


def training_state(directory: Location) -> tuple[Dropped, ...]:
    """Return the files of a training that lie beside the weights and do not go with them."""
    files = {p for pattern in _TRAINING for p in directory.glob(pattern) if p.is_file()}
    return tuple(Dropped(p.name, TRAINING_STATE, p.stat().st_size) for p in sorted(files))


def sidecars(directory: Location) -> dict[str, bytes]:
    """Return the small files of a model by name: config, tokenizer, chat template, code.

    Code files are carried as bytes and never imported. Weights and their indexes are not sidecars.
    A config of transformers 5 gets the words of transformers 4, too.
    """
    found = {}
    for path in sorted(directory.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.startswith(_LEGAL)
        weights = path.name.endswith((".index.json", f".{MANIFEST}"))  # of a single file
        weights = weights or path.name.startswith("ckptx-")
        if not wanted or weights or not path.is_file():
            continue
        if any(fnmatchcase(path.name, pattern) for pattern in _TRAINING):
            continue
        if path.stat().st_size > _MAX_SIDECAR:
            raise FormatError(
                f"{path}: {path.stat().st_size} bytes is too large for a file beside the weights; "
                "move it away"
            )
        found[path.name] = read_small(path, _MAX_SIDECAR)
    if CONFIG in found:
        found[CONFIG] = with_old_keys(found[CONFIG])
    return found


def base_sidecars(context: Context) -> dict[str, bytes]:
    """Return the sidecars of the model that ``--hf-base`` names, none without it."""
    directory = context.hf_base
    if directory is None:
        return {}
    if not directory.is_dir():
        raise FormatError(f"--hf-base {directory}: no such directory")
    files = sidecars(directory)
    if CONFIG not in files:
        raise FormatError(f"--hf-base {directory}: holds no {CONFIG}")
    return files


def hf_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...] = (),
    dropped: tuple[Dropped, ...] = (),
    options: Mapping[str, Any] | None = None,
    context: Context = UNTOLD,
    renamer: Renamer | None = None,
) -> Iterator[Message]:
    """Yield the messages of a model whose tensors have Hugging Face's names.

    The config among the sidecars of ``begin`` says which model it is, and completes ``begin``.
    Without one, or of an unknown architecture, tensors pass through. ``notes`` and ``dropped`` go
    before others. Quantised weights are dequantised to the context's dtype, by default to the one
    that the config names. LoRA adapters among the tensors, and those that the loader's ``options``
    name, are merged; for a saver of adapters they are what is left. Adapters name modules as they
    are called in memory: ``renamer`` returns, for a config, what gives the name that files have.

    Raises:
        SchemaError: tensors are missing, left over, or not of the shapes that the config says.
    """
    messages = _model_messages(begin, tensors, notes, dropped, options, context, renamer)
    yield from begin_anyway(begin, messages, context)


def _model_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...],
    dropped: tuple[Dropped, ...],
    options: Mapping[str, Any] | None,
    context: Context,
    renamer: Renamer | None,
) -> Iterator[Message]:
    held = extract.extract_adapters(begin, tensors, options or {})
    dtype = context.dtype
    if context.wants == ADAPTERS:
        yield from _adapter_messages(held, notes, dropped)
        return
    if ADAPTER_CONFIG in begin.sidecars and not held.adapters:
        notes = (*notes, _ADAPTER_BESIDE)
    begin, tensors = held.begin, held.tensors
    config = read_config(begin.sidecars, begin.root)
    family = family_of(config) if config else None
    if config is None or family is None:
        begin, tensors, _, more, gone = _merged(
            held, begin, tensors, config or {}, None, dtype, renamer
        )
        named = ", ".join((config or {}).get("architectures") or ())
        why = why_unknown(config or {}) if named else "no config names an architecture"
        why = f"{named}: {why}" if named else why
        notes = (*notes, *more, f"{why}; tensors pass through by name")
        yield from _by_name(begin, tensors, (*dropped, *gone), notes)
        return
    before, tensors = tensors, float8.dequantise(tensors, config, dtype)
    if len(tensors) < len(before):
        plain = {key: value for key, value in config.items() if key != float8.KEY}
        begin = replace(begin, sidecars={**begin.sidecars, CONFIG: dump_config(plain)})
        notes = (*notes, f"{float8.KEY} was taken out of {CONFIG}: no weight is quantised now")
    begin, tensors, config, more, gone = _merged(
        held, begin, tensors, config, family, dtype, renamer
    )
    notes, dropped = (*notes, *more), (*dropped, *gone)
    composed = family.name if family.composition else ""
    parts, begin, grown = _with_every_row(family, config, begin, tensors)
    notes = (*notes, *grown)
    known = {name for held in family.layout("hf").held(parts) for name in names_held(held)}
    tensors, around = task_heads.without_module(tensors, known)
    notes = (*notes, *around)
    if own := task_heads.heads_of(tensors, known):
        remark = task_heads.remark(own, ", ".join(_architectures(config)))
        yield from _by_name(begin, tensors, dropped, (*notes, remark))
        return
    yield from named_messages(
        replace(begin, family=composed), tensors, parts, family.layout("hf"), notes, dropped
    )


def _with_every_row(
    family: Family, config: dict[str, Any], begin: Begin, tensors: Mapping[str, LazyTensor]
) -> tuple[Parts, Begin, Sequence[str]]:
    """Return the dimensions of a model whose vocabulary is all rows of its embedding, and remarks.

    Under Hugging Face's names no row is padding: those beyond the vocabulary of the config were
    added and trained. The config is given their number.

    Raises:
        SchemaError: there are fewer rows than the config says.
    """
    parts = parts_from_config(family, config)
    said = parts["language"].vocab_size if "language" in parts else None
    name = name_among(tensors, family.layout("hf"), "embeddings", "word embeddings")
    if said is None or name not in tensors or len(tensors[name].shape) != 2:
        return parts, begin, ()
    rows = tensors[name].shape[0]
    if type(said) is not int or said < 1:
        raise SchemaError(f"{CONFIG}: vocab_size is {said!r:.60}, expected a number above 0")
    if rows == said:
        return parts, begin, ()
    text = config.get("text_config")
    if rows < said or not (_VOCABULARY in config or isinstance(text, dict)):
        raise SchemaError(
            f"{name} has {rows} rows, and {CONFIG} says {said}: it is the config of another model; "
            f"take the one of these weights, or write {rows} into it"
        )
    if _VOCABULARY in config:
        config = {**config, _VOCABULARY: rows}
    else:
        config = {**config, "text_config": {**(text or {}), _VOCABULARY: rows}}
    begin = replace(begin, sidecars={**begin.sidecars, CONFIG: dump_config(config)})
    note = (
        f"{name} has {rows} rows, and {CONFIG} said {said}: all rows are kept, and {_VOCABULARY} "
        f"is {rows} now"
    )
    return parts_from_config(family, config), begin, (note,)


def _adapter_messages(
    held: extract.ExtractedAdapters, notes: tuple[str, ...], dropped: tuple[Dropped, ...]
) -> Iterator[Message]:
    model = read_config(held.begin.sidecars, held.begin.root) or {}
    tensors, config, rest, more = exported(held, model)
    files = {ADAPTER_CONFIG: dump_config(config)}
    begin = replace(held.begin, layout=extract.LAYOUT, sidecars=files)
    yield from _by_name(begin, tensors, (*dropped, *rest), (*notes, *more))


def _by_name(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    dropped: tuple[Dropped, ...],
    notes: tuple[str, ...],
) -> Iterator[Message]:
    """Yield the messages of tensors that pass through under their own names."""
    yield begin
    yield passthrough(tensors)
    yield End(dropped, notes)


def _merged(
    held: extract.ExtractedAdapters,
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    config: dict[str, Any],
    family: Family | None,
    dtype: str | None,
    renamer: Renamer | None,
) -> tuple[Begin, Mapping[str, LazyTensor], dict[str, Any], Sequence[str], Sequence[Dropped]]:
    """Return the model with its adapters merged, its config, remarks, and what was dropped."""
    if not held.adapters:
        return begin, tensors, config, (), ()
    tied = _tie(config, family, tensors)
    held = replace(held, tensors=dict(tensors))
    kind, renamed = str(config.get("model_type") or ""), renamer and renamer(config)
    merged = adapter_merge.merge(held, kind, tied, dtype, renamed)
    if merged.untied and config:
        config = _untied(config)
        begin = replace(begin, sidecars={**begin.sidecars, CONFIG: dump_config(config)})
    return begin, merged.tensors, config, merged.notes, merged.dropped


def _tie(
    config: Mapping[str, Any], family: Family | None, tensors: Mapping[str, LazyTensor]
) -> tuple[str, str] | None:
    """Return the names of embedding and output layer if a model has one tensor for both."""
    if family is not None:
        tied = parts_from_config(family, config)["language"].tied
        return tied_names(family.layout("hf"), tensors) if tied else None
    return tie_by_names(config, tensors)


def tie_by_names(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[str, str] | None:
    """Return the names of embedding and output layer of a tied model that no schema knows."""
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    tied = config.get(_TIE, _OUTPUT not in tensors)
    return (embedding, _OUTPUT) if tied and embedding is not None else None


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {**config, _TIE: False}
    if isinstance(text := config.get("text_config"), dict) and _TIE in text:
        found["text_config"] = {**text, _TIE: False}
    return found
