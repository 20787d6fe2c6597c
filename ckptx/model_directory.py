"""A Hugging Face model directory: its small files, its config, the family that the config names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptx import adapter_merge, adapters, heads, manager, quantised
from ckptx.adapter_config import ADAPTER_CONFIG
from ckptx.adapter_export import exported
from ckptx.containers.source_file import read_small
from ckptx.errors import CkptxError, FormatError, SchemaError
from ckptx.lazy import LazyTensor
from ckptx.loading import drop_ignored, main_dtype, messages_of, passthrough, resolve_tie
from ckptx.protocol import WEIGHTS_ONLY, Begin, Dropped, End, Message
from ckptx.publish import MANIFEST
from ckptx.saving import Model, fill_unused, named_tensors
from ckptx.schema import Family, Held, Layout, Parts
from ckptx.spec import ModelSpec

CONFIG = "config.json"
_SUFFIXES = {".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
MAX_LAYERS = 100_000
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_TIE = "tie_word_embeddings"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT = "lm_head.weight"
"""What embedding and output layer are called in models that no schema knows."""
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


def training_state(directory: Path) -> tuple[Dropped, ...]:
    """Return the files of a training that lie beside the weights and do not go with them."""
    files = {p for pattern in _TRAINING for p in directory.glob(pattern) if p.is_file()}
    return tuple(Dropped(p.name, WEIGHTS_ONLY, p.stat().st_size) for p in sorted(files))


def sidecars(directory: Path) -> dict[str, bytes]:
    """Return the small files of a model by name: config, tokenizer, chat template, code.

    Code files are carried as bytes and never imported. Weights and their indexes are not sidecars.
    """
    found = {}
    for path in sorted(directory.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.startswith(_LEGAL)
        weights = path.name.endswith((".index.json", f".{MANIFEST}"))  # of a single file
        weights = weights or path.name.startswith("ckptx-")
        if not wanted or weights or not path.is_file():
            continue
        if any(path.match(pattern) for pattern in _TRAINING):
            continue
        if path.stat().st_size > _MAX_SIDECAR:
            raise FormatError(
                f"{path}: {path.stat().st_size} bytes is too large for a file beside the weights; "
                "move it away"
            )
        found[path.name] = read_small(path, _MAX_SIDECAR)
    return found


def read_config(files: Mapping[str, bytes], place: object) -> dict[str, Any] | None:
    """Return the config among the sidecars of ``place``, None if there is none.

    Raises:
        FormatError: it is no JSON object.
    """
    if CONFIG not in files:
        return None
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}/{CONFIG}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{place}/{CONFIG}: expected a JSON object")
    return config


def base_sidecars(options: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the sidecars of the model that ``--hf-base`` names, none without it."""
    base = options.get("hf_base")
    if base is None:
        return {}
    directory = Path(base)
    if not directory.is_dir():
        raise FormatError(f"--hf-base {directory}: no such directory")
    files = sidecars(directory)
    if CONFIG not in files:
        raise FormatError(f"--hf-base {directory}: holds no {CONFIG}")
    return files


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose architecture a config names, None if no schema knows it.

    The class decides: the weights of ``LlamaForSequenceClassification`` are not those of
    ``LlamaForCausalLM``. Only a config that names no class goes by its ``model_type``.
    """
    return next((family for family in _named_by(config) if family.layouts), None)


def _named_by(config: Mapping[str, Any]) -> Iterator[Family]:
    architectures = _architectures(config)
    for family in manager.families().values():
        if any(name in family.architectures for name in architectures) or (
            not architectures and config.get("model_type") in family.model_types
        ):
            yield family


def why_unknown(config: Mapping[str, Any]) -> str:
    """Return why there is no schema for what a config names."""
    reasons = [why for family in _named_by(config) for why in family.refused.values()]
    if not reasons and any(name.endswith(heads.CLASSES) for name in _architectures(config)):
        return "Megatron has no place for its head"
    return reasons[0] if reasons else "ckptx does not know this architecture"


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config names."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        SchemaError: no schema plugin registers it.
    """
    families = manager.families()
    if name not in families:
        raise SchemaError(f"unknown model family {name!r}; known: {', '.join(sorted(families))}")
    return families[name]


def hf_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    notes: tuple[str, ...] = (),
    dtype: str | None = None,
    dropped: tuple[Dropped, ...] = (),
    options: Mapping[str, Any] | None = None,
    renamer: Renamer | None = None,
) -> Iterator[Message]:
    """Yield the messages of a model whose tensors have Hugging Face's names.

    The config among the sidecars of ``begin`` says which model it is, and completes ``begin``.
    Without one, or of an unknown architecture, tensors pass through. ``notes`` and ``dropped`` go
    before others. Quantised weights are dequantised to ``dtype``, by default to the one that the
    config names. LoRA adapters among the tensors, and those that the loader's ``options`` name, are
    merged; for a saver of adapters they are what is left. Adapters name modules as they are called
    in memory: ``renamer`` returns, for a config, what gives the name that files have for one.

    Raises:
        SchemaError: tensors are missing, left over, or not of the shapes that the config says.
    """
    options = options or {}
    held = adapters.separate(begin, tensors, options)
    if options.get("saver") == adapters.LAYOUT:
        yield from _adapter_messages(held, notes, dropped)
        return
    begin, tensors = held.begin, held.tensors
    config = read_config(begin.sidecars, begin.root)
    family = family_of(config) if config else None
    if config is None or family is None:
        begin, tensors, _, more, gone = _merged(
            held, begin, tensors, config or {}, None, dtype, renamer
        )
        notes, dropped = (*notes, *more), (*dropped, *gone)
        named = ", ".join((config or {}).get("architectures") or ())
        why = (
            f"{named}: {why_unknown(config or {})}" if named else "no config names an architecture"
        )
        yield begin
        yield passthrough(tensors)
        yield End(dropped, (*notes, f"{why}; tensors pass through by name"))
        return
    before, tensors = tensors, quantised.dequantise(tensors, config, dtype)
    if len(tensors) < len(before):
        plain = {key: value for key, value in config.items() if key != quantised.KEY}
        begin = replace(begin, sidecars={**begin.sidecars, CONFIG: dump_config(plain)})
        notes = (*notes, f"{quantised.KEY} was taken out of {CONFIG}: no weight is quantised now")
    begin, tensors, config, more, gone = _merged(
        held, begin, tensors, config, family, dtype, renamer
    )
    notes, dropped = (*notes, *more), (*dropped, *gone)
    composed = family.name if family.composition else ""
    parts = parts_from_config(family, config)
    known = {name for held in family.layout("hf").held(parts) for name in names_held(held)}
    tensors, around = heads.without_module(tensors, known)
    notes = (*notes, *around)
    if own := heads.heads_of(tensors, known):
        yield begin
        yield passthrough(tensors)
        yield End(dropped, (*notes, heads.remark(own, ", ".join(_architectures(config)))))
        return
    yield from named_messages(
        replace(begin, family=composed), tensors, parts, family.layout("hf"), notes, dropped
    )


def _adapter_messages(
    held: adapters.Separated, notes: tuple[str, ...], dropped: tuple[Dropped, ...]
) -> Iterator[Message]:
    model = read_config(held.begin.sidecars, held.begin.root) or {}
    tensors, config, rest, more = exported(held, model)
    files = {ADAPTER_CONFIG: dump_config(config)}
    yield replace(held.begin, layout=adapters.LAYOUT, sidecars=files)
    yield passthrough(tensors)
    yield End((*dropped, *rest), (*notes, *more))


def _merged(
    held: adapters.Separated,
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


def named_messages(
    begin: Begin,
    tensors: Mapping[str, LazyTensor],
    spec: ModelSpec | Parts,
    layout: Layout,
    notes: tuple[str, ...] = (),
    dropped: tuple[Dropped, ...] = (),
) -> Iterator[Message]:
    """Yield the messages of a model of known dimensions whose tensors have the names of a layout.

    ``spec`` are the dimensions of its one part, or those of each. ``notes`` and ``dropped`` go
    before others.

    Raises:
        SchemaError: tensors are missing, left over, or not of the shapes that the spec says.
    """
    dtype = main_dtype(tensors)
    said = {"language": spec} if isinstance(spec, ModelSpec) else spec
    parts = {part: replace(one, dtype=dtype) for part, one in said.items()}
    spec = parts["language"]
    left = dict(tensors)
    dropped = (*dropped, *drop_ignored(layout, left))
    if spec.mtp_num_layers and not further_names(layout, spec) & set(left):
        note = (
            f"the config says {spec.mtp_num_layers} layers for multi-token prediction, the weights "
            "hold none, as transformers saves them: the model is converted without"
        )
        spec, notes = replace(spec, mtp_num_layers=0), (*notes, note)
    if spec.tied:
        tied, copies, remarks = resolve_tie(left, *tied_names(layout, left), begin.files)
        spec, dropped, notes = replace(spec, tied=tied), (*dropped, *copies), (*notes, *remarks)
    parts = {**parts, "language": spec}
    yield replace(begin, layout=layout.name, parts=parts)
    yield from messages_of(layout, left, parts)
    yield End(dropped, notes)


def parts_from_config(family: Family, config: Mapping[str, Any]) -> Parts:
    """Return the dimensions of every part that a config of a family says.

    Raises:
        SchemaError: it says what no schema covers, or values are not of their types.
    """
    _check_depth(config)
    composed = family.composition
    try:
        if composed:
            parts = composed.from_config(config)
        else:
            parts = {"language": family.from_config(config)}
    except CkptxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SchemaError(
            f"{CONFIG}: a value of it is not what a config of {family.name} has there "
            f"({type(error).__name__}: {error!s:.200}); copy it again from where the model is from"
        ) from error
    for spec in parts.values():
        for field in _SIZES:
            found = getattr(spec, field)
            if type(found) is not int or found < 0:
                raise SchemaError(
                    f"{CONFIG}: {field} would be {found!r:.40}, expected a natural number; copy it "
                    "again from where the model is from"
                )
    return parts


def _check_depth(config: Mapping[str, Any]) -> None:
    """Raise where the lists of layers that a config asks for would fill the memory."""
    for one in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _DEPTHS:
            if isinstance(one.get(key), int | float) and not one[key] <= MAX_LAYERS:
                raise SchemaError(
                    f"{CONFIG}: {key} is {one[key]!s:.40}, expected at most {MAX_LAYERS}"
                )


def names_held(held: Held) -> set[str]:
    """Return the names, in any spelling, of all tensors of a message."""
    experts = held.spec.num_experts or 0
    return {
        name
        for entry in held.rules
        for spelling in entry.spellings
        for name in spelling.named(held.layer, experts)
    }


def further_names(layout: Layout, spec: ModelSpec) -> set[str]:
    """Return the names that the layers for multi-token prediction have in a layout."""
    without = replace(spec, mtp_num_layers=0)
    copies = {name for _, _, name in layout.copies_of(spec)}
    return copies | set(layout.names(spec)) - set(layout.names(without))


def tied_names(layout: Layout, tensors: Mapping[str, LazyTensor]) -> tuple[str, str]:
    """Return the names that a layout has for the embedding and the output layer of a model."""
    pair = (("embeddings", "word embeddings"), ("output layer", "weight"))
    spellings = [layout.names_of(*one) for one in pair]
    found = [next((name for name in names if name in tensors), names[0]) for names in spellings]
    return found[0], found[1]


def hf_tensors(model: Model) -> tuple[dict[str, LazyTensor], tuple[Dropped, ...]]:
    """Return the tensors of a model under Hugging Face's names, and the padding dropped.

    What such a model must have and does not use is filled, unless `fill_unused` has done so.

    Raises:
        SchemaError: they have other names and no schema knows the model.
    """
    if model.passthrough is None:
        family = family_named(model.family)
        fill_unused(model, family)
        return named_tensors(model, family.layout("hf"))
    if not model.begin.layout.startswith("hf"):
        raise SchemaError(
            f"tensors are named as {model.begin.layout} and no schema knows their model; "
            "give --hf-base with a config of a known architecture"
        )
    return dict(model.passthrough), ()


def config_of(model: Model) -> dict[str, bytes]:
    """Return a ``config.json`` made from the model's dimensions, nothing where they are unknown."""
    if model.passthrough is not None:
        return {}
    return {CONFIG: dump_config(config_from_parts(family_named(model.family), model.parts))}


def config_from_parts(family: Family, parts: Parts) -> dict[str, Any]:
    """Return a complete config for a model whose own is not at hand."""
    composed = family.composition
    return composed.to_config(parts) if composed else family.to_config(parts["language"])


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as transformers writes it: sorted, indented by two, a newline at the end."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
