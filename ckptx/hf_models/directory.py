"""A Hugging Face model directory: its small files, its config, the family that the config names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ckptx.errors import CkptxError, FormatError, NamesError, SchemaError, listing
from ckptx.hf_models import float8, task_heads
from ckptx.hf_models.lora import extract
from ckptx.hf_models.lora import merge as adapter_merge
from ckptx.hf_models.lora.completeness import check_alone
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.export import exported
from ckptx.hf_models.spellings import with_old_keys
from ckptx.model.family import Family
from ckptx.model.layout import Parts
from ckptx.protocol import from_names
from ckptx.protocol.context import ADAPTERS, ANYTHING, UNTOLD, Context
from ckptx.protocol.messages import TRAINING_STATE, Begin, Dropped, End, Message
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import _architectures, family_of, parts_from_config, why_unknown
from ckptx.storage.location import Location
from ckptx.storage.partial import MANIFEST
from ckptx.storage.source_file import read_small
from ckptx.tensors.lazy import LazyTensor

_SUFFIXES = {".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_NO_ARCHITECTURE = "no config names an architecture"
_VOCABULARY = "vocab_size"
_TIE = "tie_word_embeddings"
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


def masters_beside(directory: Location) -> tuple[str, ...]:
    """Return a remark where a checkpoint of DeepSpeed lies below a directory of weights."""
    found = sorted({path.parent.name for path in directory.glob("*/*_model_states.pt")})
    if not found:
        return ()
    return (
        f"{' and '.join(found)} below it holds the fp32 masters of what was trained, which are for "
        "--from deepspeed",
    )


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
    model = _Model(begin, tensors, notes, dropped, options or {}, context, renamer)
    yield from from_names.begin_anyway(begin, model.messages(), context)


@dataclass(slots=True)
class _Model:
    """A model on its way from its files to messages; see `hf_messages`."""

    begin: Begin
    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    options: Mapping[str, Any]
    context: Context
    renamer: Renamer | None
    config: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> Iterator[Message]:
        """Yield the messages."""
        held = extract.extract_adapters(self.begin, self.tensors, self.options)
        if self.context.wants == ADAPTERS:
            yield from self._adapter(held)
            return
        if ADAPTER_CONFIG in self.begin.sidecars and not held.adapters:
            self.notes += (_ADAPTER_BESIDE,)
        self.begin, self.tensors = held.begin, held.tensors
        self._ignore()
        self.config = read_config(self.begin.sidecars, self.begin.root) or {}
        family = family_of(self.config) if self.config else None
        if family is None:
            self._refuse_empty(set())
            self._merge(held, None)
            named = ", ".join(self.config.get("architectures") or ())
            why = f"{named}: {why_unknown(self.config)}" if named else _NO_ARCHITECTURE
            yield from self._by_name(f"{why}; tensors pass through by name")
            return
        plain = float8.dequantise(self.tensors, self.config, self.context.dtype)
        if len(plain) < len(self.tensors):
            self._say({key: value for key, value in self.config.items() if key != float8.KEY})
            self.notes += (f"{float8.KEY} was taken out of {CONFIG}: no weight is quantised now",)
        self.tensors = plain
        self._merge(held, family)
        if family_of(self.config) is None:  # an adapter has made another class of it
            yield from self._by_name()
            return
        parts, layout = self._with_every_row(family), family.layout("hf")
        known = {name for group in layout.held(parts) for name in from_names.names_held(group)}
        self.tensors, around = task_heads.without_module(self.tensors, known)
        self._refuse_empty(known)
        self.notes += around
        if own := task_heads.heads_of(self.tensors, known):
            remark = task_heads.remark(own, ", ".join(_architectures(self.config)))
            yield from self._by_name(remark)
            return
        yield from self._named(family, parts, known)

    def _named(self, family: Family, parts: Parts, known: Collection[str]) -> Iterator[Message]:
        """Yield the messages of a model of a family; by name, if other tensors are among its own.

        Raises:
            SchemaError: the tensors are not those of the family, or of another config.
        """
        begin = replace(self.begin, family=family.name if family.composition else "")
        named = from_names.named_messages(
            begin, self.tensors, parts, family.layout("hf"), self.notes, self.dropped
        )
        begun = next(named)
        try:
            first = next(named)  # when all tensors have found a place
        except NamesError as error:
            looked_at = self.context.wants == ANYTHING  # then it is said what does not fit
            if looked_at or error.missing or task_heads.in_doubt(error.extra, known):
                yield begun
                raise SchemaError(f"{error}{self._advice(error)}") from error
            named_as = ", ".join(_architectures(self.config)) or family.name
            yield from self._by_name(
                f"{listing(error.extra)}: no part of {named_as}; tensors pass through by name "
                "(--ignore leaves some behind)"
            )
            return
        except CkptxError:
            yield begun
            raise
        yield begun
        yield first
        yield from named

    def _advice(self, error: NamesError) -> str:
        """Return what to do about tensors that are missing."""
        if not error.missing or error.extra or self.context.fill_from_base:
            return ""
        given = "" if self.context.hf_base else "--hf-base DIR "
        base = self.context.hf_base or "the model that was trained"
        return (
            f"; if they were frozen and not saved, {given}--fill-from-base '*' takes them from "
            f"{base}"
        )

    def _ignore(self) -> None:
        """Leave behind what ``--ignore`` names.

        Raises:
            FormatError: a pattern is that of no tensor.
        """
        left = dict(self.tensors)
        for glob in self.options.get("ignore") or ():
            names = [name for name in left if fnmatchcase(name, glob)]
            if not names:
                raise FormatError(
                    f"{self.begin.root}: --ignore {glob!r} is the pattern of no tensor; they are "
                    f"as {listing(self.tensors, 2)}"
                )
            for name in names:
                one = left.pop(name)
                self.dropped += (Dropped(name, f"--ignore {glob}", one.nbytes, (one,)),)
        self.tensors = left

    def _refuse_empty(self, known: Collection[str]) -> None:
        """Refuse tensors without elements that the model has, or most of those there are.

        Raises:
            FormatError: there are such.
        """
        empty = [name for name, one in self.tensors.items() if one.shape == (0,)]
        if any(name in known for name in empty) or 2 * len(empty) > len(self.tensors):
            raise FormatError(
                f"{self.begin.root}: {listing(empty)} have no elements: under ZeRO-3 weights must "
                "be gathered before they are saved, and these were not; convert the checkpoint of "
                "DeepSpeed that was saved with them (the directory with 'latest')"
            )

    def _say(self, config: dict[str, Any]) -> None:
        """Let the model have another config beside its weights."""
        self.config = config
        sidecars = {**self.begin.sidecars, CONFIG: dump_config(config)}
        self.begin = replace(self.begin, sidecars=sidecars)

    def _by_name(self, *notes: str) -> Iterator[Message]:
        """Yield the messages of tensors that pass through under their own names."""
        text = self.config.get("text_config") or {}
        said = self.config.get(_TIE, isinstance(text, dict) and text.get(_TIE))
        if said and (names := tie_by_names(self.config, self.tensors)):
            left = dict(self.tensors)
            tied, copies, remarks = from_names.resolve_tie(left, *names, self.begin.files)
            self.tensors, self.dropped = left, (*self.dropped, *copies)
            self.notes += remarks
            if not tied:
                self._say(_untied(self.config))
        yield self.begin
        yield from_names.passthrough(self.tensors)
        yield End(self.dropped, (*self.notes, *notes))

    def _adapter(self, held: extract.ExtractedAdapters) -> Iterator[Message]:
        """Yield the messages of the adapter alone."""
        model = read_config(held.begin.sidecars, held.begin.root) or {}
        self.tensors, config, rest, notes = exported(held, model)
        check_alone(held.adapters[0])
        files = {ADAPTER_CONFIG: dump_config(config)}
        self.begin = replace(held.begin, layout=extract.LAYOUT, sidecars=files)
        self.dropped += rest
        yield from self._by_name(*notes)

    def _merge(self, held: extract.ExtractedAdapters, family: Family | None) -> None:
        """Merge the adapters, if there are any."""
        if not held.adapters:
            return
        tied = _tie(self.config, family, self.tensors)
        held = replace(held, tensors=dict(self.tensors))
        kind = str(self.config.get("model_type") or "")
        renamed = self.renamer and self.renamer(self.config)
        merged = adapter_merge.merge(held, kind, tied, self.context.dtype, renamed)
        if merged.untied and self.config:
            self._say(_untied(self.config))
        if merged.rows and family is None and _VOCABULARY in self.config:
            self._say({**self.config, _VOCABULARY: merged.rows})
        if merged.head:
            self._become(merged.head, merged.labels)
        self.tensors = merged.tensors
        self.notes += tuple(merged.notes)
        self.dropped += tuple(merged.dropped)

    def _become(self, head: str, labels: int) -> None:
        """Let the config be that of a class with another head."""
        first = next(iter(_architectures(self.config)), "")
        stem = first.removesuffix("ForCausalLM")
        if stem == first:
            raise SchemaError(
                f"{self.begin.root}: the adapter brings a head of a model {head}, and which class "
                f"of transformers {first or 'a model without architectures'} is then is not known; "
                "save the base as a model of that class, and give that"
            )
        names = [f"LABEL_{number}" for number in range(labels)]
        config = {**self.config, "architectures": [stem + head]}
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        self._say(config)
        self.notes += (
            f"the adapter brings the head of a {stem + head} with {labels} "
            f"label{'s' * (labels > 1)}, and the config says so",
        )

    def _with_every_row(self, family: Family) -> Parts:
        """Return the dimensions of a model whose vocabulary is all rows of its embedding.

        Under Hugging Face's names no row is padding: those beyond the vocabulary of the config were
        added and trained. The config is given their number.

        Raises:
            SchemaError: there are fewer rows than the config says.
        """
        config, tensors = self.config, self.tensors
        parts = parts_from_config(family, config)
        said = parts["language"].vocab_size if "language" in parts else None
        name = from_names.name_among(tensors, family.layout("hf"), "embeddings", "word embeddings")
        if said is None or name not in tensors or len(tensors[name].shape) != 2:
            return parts
        rows = tensors[name].shape[0]
        if type(said) is not int or said < 1:
            raise SchemaError(f"{CONFIG}: vocab_size is {said!r:.60}, expected a number above 0")
        if rows == said:
            return parts
        text = config.get("text_config")
        if rows < said or not (_VOCABULARY in config or isinstance(text, dict)):
            raise SchemaError(
                f"{name} has {rows} rows, and {CONFIG} says {said}: it is the config of another "
                f"model; take the one of these weights, or write {rows} into it"
            )
        own: dict[str, Any] = {_VOCABULARY: rows}
        if _VOCABULARY not in config:
            own = {"text_config": {**(text or {}), _VOCABULARY: rows}}
        self._say({**config, **own})
        self.notes += (
            f"{name} has {rows} rows, and {CONFIG} said {said}: all rows are kept, and "
            f"{_VOCABULARY} is {rows} now",
        )
        return parts_from_config(family, self.config)


def _tie(
    config: Mapping[str, Any], family: Family | None, tensors: Mapping[str, LazyTensor]
) -> tuple[str, str] | None:
    """Return the names of embedding and output layer if a model has one tensor for both."""
    if family is not None:
        tied = parts_from_config(family, config)["language"].tied
        return from_names.tied_names(family.layout("hf"), tensors) if tied else None
    return tie_by_names(config, tensors)


def tie_by_names(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[str, str] | None:
    """Return the names of embedding and output layer of a tied model that no schema knows."""
    embedding = next((name for name in tensors if name.endswith(adapter_merge.EMBEDDINGS)), None)
    tied = config.get(_TIE, adapter_merge.OUTPUT not in tensors)
    return (embedding, adapter_merge.OUTPUT) if tied and embedding is not None else None


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {**config, _TIE: False}
    if isinstance(text := config.get("text_config"), dict) and _TIE in text:
        found["text_config"] = {**text, _TIE: False}
    return found
