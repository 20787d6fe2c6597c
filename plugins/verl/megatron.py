"""What verl's Megatron workers save: Megatron Core's files, without the args that describe them.

    actor/
        dist_ckpt/                      torch_dist: model, optimizer, random states
        huggingface/                    config and tokenizer; with a bridge the weights, too
        transformer_config.json
    actor/                              before verl 0.4
        model/mp_rank_TT[_PPP]/model.pt     a list: the state dict of every virtual stage
        huggingface/

Names are Megatron Core's, with nothing before them. The dimensions are those of the config. The
output layer of a critic or a reward model is a plain linear layer with one output, which every
tensor-parallel rank holds whole.

Source: volcengine/verl verl/utils/checkpoint/megatron_checkpoint_manager.py @ 0079597,
verl/utils/megatron/dist_checkpointing.py @ 06baebf, scripts/legacy_model_merger.py @ 0d3aa25,
verl/models/llama/megatron/layers/parallel_linear.py @ c3b2057.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptx.errors import FormatError, SchemaError, listing
from ckptx.model.canonical_names import check_shapes
from ckptx.model.family import Family
from ckptx.model.layout import Parts
from ckptx.plugins.megatron import per_rank, rank_names, torch_dist
from ckptx.plugins.megatron.adapters import adapters_of
from ckptx.plugins.megatron.directory import IterationDirectory
from ckptx.plugins.megatron.source import Excluded, Source
from ckptx.protocol.context import Context, Options
from ckptx.protocol.from_names import passthrough, resolve_tie, tied_names
from ckptx.protocol.messages import Begin, Dropped, End, Messages, Tensors
from ckptx.protocol.model import collect, named_tensors
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import family_of, parts_from_config
from ckptx.storage.location import Location
from ckptx.tensors.lazy import Filled, LazyTensor, replicated

DISTRIBUTED = "dist_ckpt"
PER_RANK = "model"
TRANSFORMER_CONFIG = "transformer_config.json"
_HEAD = "output_layer.weight"
_HEAD_BIAS = "output_layer.bias"
_CLASSES = ("ForTokenClassification", "ForSequenceClassification")
_CAUSAL = "ForCausalLM"
_VALUE = _CLASSES[0]


def holds_model(directory: Location) -> bool:
    """Return whether a directory is what a Megatron worker has saved."""
    return (directory / DISTRIBUTED).is_dir() or any(
        directory.glob(f"{PER_RANK}/mp_rank_*/model.pt")
    )


def messages(
    directory: Location, begin: Begin, end: End, options: Options, context: Context
) -> Messages:
    """Yield the model; ``begin`` has its format, sidecars and iteration.

    ``end`` is what else stays behind, and remarks.

    A value model has no Megatron layout of its own: its tensors travel under Hugging Face's names.

    Raises:
        FormatError: files are missing, or hold no weights, or adapters that are not merged.
        SchemaError: there is no config of a known family, or it is of another model.
    """
    family, config = _family(begin, directory)
    parts = parts_from_config(family, config)
    layout = family.layout("mcore")
    place = _place(directory, begin.training["iteration"])
    notes, dropped, no_output = end.notes, end.dropped, bool(options.get("tie_word_embedding"))
    source = _read(
        place, lambda name, tensor: _is_head(name, tensor) or (no_output and name == _HEAD)
    )
    begin = replace(begin, files=source.files, sources=source.sources)
    spec = replace(parts["language"], dtype=source.dtype)
    if spec.tied and _HEAD in source.weights and place.format == "torch_dist":
        pair = dict(source.weights)
        tied, copies, remarks = resolve_tie(pair, *tied_names(layout, pair), begin.files)
        spec, dropped, notes = replace(spec, tied=tied), (*dropped, *copies), (*notes, *remarks)
        source = _read(place, lambda name, _: tied and name == _HEAD)
    head = {} if no_output else _head(source)
    if options.get("is_value_model") and not head:
        raise SchemaError(
            f"{place.path}: --is-value-model was given, but there is no {_HEAD} with one row"
        )
    if no_output:
        dropped += tuple(
            Dropped(name, "left out: --tie-word-embedding", 0, tuple(tensors))
            for name, tensors in source.apart.items()
        )
    if head or no_output:
        spec = replace(spec, tied=True)  # to layouts: without an output layer of its own
    parts = {**parts, "language": spec}
    lora = adapters_of(source, options, context)
    if lora and not lora.is_merged:
        yield from lora.exported(begin, layout, parts, notes)
        return
    dropped, notes = (*dropped, *source.dropped), (*notes, *(lora or source).notes)
    found = []
    for message in (lora or source).messages(layout, parts):
        check_shapes(message.name, message.tensors, parts[message.part])
        found.append(message)
    if head:
        end = End(dropped, notes)
        yield from _value_model(begin, family, config, parts, found, head, end)
        return
    yield replace(begin, layout=layout.name, parts=parts)
    yield from found
    yield End(dropped, notes)


def _place(directory: Location, iteration: Any) -> IterationDirectory:
    path = directory / DISTRIBUTED
    if not path.is_dir():
        return IterationDirectory(directory / PER_RANK, iteration, "torch")
    if not (path / "metadata.json").is_file():
        raise FormatError(
            f"{path}: holds no metadata.json, which is written last: the save was not finished; "
            "use an earlier step"
        )
    return IterationDirectory(path, iteration, "torch_dist")


def _read(place: IterationDirectory, apart: Excluded) -> Source:
    """Read a checkpoint of either form.

    Raises:
        FormatError: it is damaged, or holds no weights.
    """
    if place.format == "torch_dist":
        source = torch_dist.read(place, apart)
    else:
        source = per_rank.read(place, kind=rank_names.Files(("model.pt",), _stages), apart=apart)
    if not source.sources:
        beside = place.path.parent / "huggingface"
        weights = sorted(beside.glob("*.safetensors")) if beside.is_dir() else []
        where = f"; they are in {beside}: convert that directory" if weights else ""
        raise FormatError(f"{place.path}: holds no weights{where}")
    return source


def _is_head(name: str, tensor: LazyTensor) -> bool:
    """Return whether a tensor is of a head with one output, which GPT layouts do not have."""
    return name == _HEAD_BIAS or (name == _HEAD and tensor.shape[:1] == (1,))


def _stages(value: Any, path: Location) -> Any:
    """Return the list of a rank's virtual stages as Megatron has it."""
    if isinstance(value, Mapping) and "model" not in value:
        value = [value]
    if not isinstance(value, list) or not value:
        raise FormatError(f"{path}: expected a list of state dicts, found {type(value).__name__}")
    if len(value) == 1:
        return {"model": value[0]}
    return {f"model{number}": stage for number, stage in enumerate(value)}


def _family(begin: Begin, directory: Location) -> tuple[Family, dict[str, Any]]:
    """Return the family, and the config as that of a causal model."""
    if (config := read_config(begin.sidecars, directory)) is None:
        raise SchemaError(
            f"{directory}: holds no huggingface/{CONFIG}, and Megatron's workers save no args; "
            "give --hf-base with the config of this model"
        )
    names = config.get("architectures") or []
    causal = [_in_class(str(name), _CAUSAL) for name in names]
    if (family := family_of({**config, "architectures": causal})) is None:
        raise SchemaError(
            f"{directory}: no schema knows {listing(map(str, names)) or 'a config without class'}, "
            "so Megatron's names cannot be told apart"
        )
    return family, config


def _in_class(architecture: str, ending: str) -> str:
    """Return the name of an architecture's class for another task.

    Examples:
        >>> _in_class("Qwen2ForTokenClassification", "ForCausalLM")
        'Qwen2ForCausalLM'
    """
    for known in (*_CLASSES, _CAUSAL):
        if architecture.endswith(known):
            return architecture.removesuffix(known) + ending
    return architecture


def _head(source: Source) -> dict[str, LazyTensor]:
    """Return the weight, and the bias if any, of a value model; nothing of any other."""
    if _HEAD not in source.apart:
        if _HEAD_BIAS in source.apart:
            raise SchemaError(
                f"{source.place}: has an {_HEAD_BIAS}, but {_HEAD} is no value head of one row"
            )
        return {}
    pair = {"score.weight": _HEAD, "score.bias": _HEAD_BIAS}
    return {
        name: replicated(list(source.apart[own]))
        for name, own in pair.items()
        if own in source.apart
    }


def _value_model(
    begin: Begin,
    family: Family,
    config: dict[str, Any],
    parts: Parts,
    found: list[Tensors],
    head: Mapping[str, LazyTensor],
    end: End,
) -> Messages:
    """Yield a value model as transformers' class for values of tokens: a body and ``score``."""
    model = collect(iter([replace(begin, parts=parts), *found, End()]))
    named, padding = named_tensors(model, family.layout("hf"))
    known = [str(name) for name in config.get("architectures") or [f"X{_CAUSAL}"]]
    score, notes = dict(head), end.notes
    of_sequences = known[0].endswith(_CLASSES[1]) and "score.bias" not in head
    if not of_sequences and "score.bias" not in score:
        score["score.bias"] = Filled(parts["language"].dtype, (1,))
        notes += ("score.bias: the head has none, filled with 0",)
    if not of_sequences:
        known = [_in_class(name, _VALUE) for name in known]
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config = {**config, "architectures": known, **labels}
    note = f"a value model: its output layer became score, the architecture {known[0]}"
    yield replace(
        begin, layout="hf", parts={}, sidecars={**begin.sidecars, CONFIG: dump_config(config)}
    )
    yield passthrough({**named, **score})
    yield End((*end.dropped, *padding), (*notes, note))
