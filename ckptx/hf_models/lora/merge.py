"""Merge LoRA adapters into their base.

A merge is what peft's ``merge_and_unload`` makes of an adapter that it has loaded from disk, with
two exceptions. An embedding and an output layer that are one tensor become two where the adapter
was trained on one of them, which is reported: peft adds the update to both. And matrices that lie
in a training checkpoint in 16 bits are multiplied as those of an adapter's file are, in float32.

Source: huggingface/peft src/peft/tuners/lora/layer.py, src/peft/utils/other.py,
src/peft/tuners/tuners_utils.py (_inject_parameters, cast_adapter_dtype) @ v0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from ckptx.errors import SchemaError, listing
from ckptx.hf_models import task_heads
from ckptx.hf_models.lora.completeness import check_saved, check_targets
from ckptx.hf_models.lora.extract import Adapter, ExtractedAdapters
from ckptx.hf_models.lora.names import MATRICES, TOKENS, plain
from ckptx.protocol.messages import Dropped
from ckptx.tensors.dtypes import DTYPES, dtype_name
from ckptx.tensors.joins import concat, stack, unstacked
from ckptx.tensors.lazy import Filled, LazyTensor
from ckptx.tensors.low_rank import check_ranks, updated

_TRANSPOSED_LINEAR = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose linear layers are `transformers.pytorch_utils.Conv1D`, which stores [in, out]."""
_TRANSPOSED_EXPERTS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Models whose stacked experts are [experts, in, out]; others have [experts, out, in]."""
OUTPUT = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
VOCABULARY = (*EMBEDDINGS, OUTPUT, "embed_out.weight")
"""What embedding and output layer are called."""
_TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""The classes for the tasks of peft.

Source: huggingface/peft src/peft/utils/peft_types.py @ v0.21.2."""
_TASK_HEAD = re.compile(r"(score|classifier)\.(weight|bias)")
_WIDEST_NORM = 1 << 28  # bytes of float32 that one norm of a transposed matrix may make us read


_EXPERTS = "mlp.experts"
"""The module that holds experts as stacked parameters."""
_ONE_BY_ONE = {
    "mlp.experts": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe.experts": ("w1", "w3", "w2"),
}
"""What files call it where they have one tensor for every expert: gate, up and down.

Source: transformers:src/transformers/conversion_mapping.py @ v5.23.0.
"""
_STACKED = ("gate_up_proj", "down_proj")
"""Parameters of experts in the order in which their modules register them."""
_RENAMED = ((".mlp.", ".block_sparse_moe."),)


class _Matrices(NamedTuple):
    """B and A, whose product is an update."""

    left: LazyTensor
    right: LazyTensor

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return self.left.shape[0], self.right.shape[1]

    def by_expert(self, count: int) -> Iterator[_Matrices]:
        """Yield the matrices of every expert.

        A holds the ranks of one expert after those of another, B has the experts innermost.
        """
        ranks = self.right.shape[0] // count
        columns = self.left.split(1, count)  # [out, rank, expert]
        for expert in range(count):
            own = self.right.narrow(0, expert * ranks, (expert + 1) * ranks)
            yield _Matrices(columns.narrow(2, expert, expert + 1).merge(1), own)


@dataclass(slots=True)
class Merged:
    """A base with its adapters merged, and what the report has to say of it."""

    tensors: dict[str, LazyTensor]
    untied: bool = False
    rows: int = 0
    """Those of the vocabulary where an adapter has extended it, else 0."""
    head: str = ""
    """The class of the head that an adapter brings, ``"ForSequenceClassification"``."""
    labels: int = 0
    """The rows of that head."""
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def merge(
    separated: ExtractedAdapters,
    model_type: str,
    tied: tuple[str, str] | None,
    dtype: str | None = None,
    name_in_files: Callable[[str], str] | None = None,
) -> Merged:
    """Return the base with all adapters merged into it, in their order.

    ``tied`` are the names of the embedding and of the output layer where both are one tensor.
    Where the model is to have another ``dtype``, sums are taken in float32 and all weights are left
    in it: who casts the model rounds them once, whether they have changed or not.
    ``name_in_files`` returns what the base's files call a tensor that the adapter names as it is
    called in memory; without it both names are taken to be the same.

    Raises:
        SchemaError: a tensor of an adapter has no weight in the base, or does not fit it.
    """
    wanted = dtype_name(dtype) if dtype else None
    merged = Merged(
        {
            name: tensor.cast("float32") if wanted and _is_cast(tensor, wanted) else tensor
            for name, tensor in separated.tensors.items()
        }
    )
    for adapter in separated.adapters:
        _Merge(merged, adapter, model_type, tied, name_in_files or str).run()
        if merged.untied:
            tied = None
    return merged


def _is_cast(tensor: LazyTensor, dtype: str) -> bool:
    """Return whether a weight is computed with and is to have another dtype than its own."""
    return tensor.dtype in DTYPES and tensor.dtype != dtype


@dataclass(slots=True)
class _Merge:
    """One adapter on its way into the base."""

    merged: Merged
    adapter: Adapter
    model_type: str
    tied: tuple[str, str] | None
    name_in_files: Callable[[str], str]
    scales: set[tuple[int, float]] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Merge: whole tensors first, then updates, then rows."""
        config = self.adapter.config
        groups: dict[str, dict[str, LazyTensor]] = {}
        whole: dict[str, LazyTensor] = {}
        for key, said in self.adapter.names().items():
            if said.kind in ("", "saved"):
                whole[said.module] = self.adapter.tensors[key]
            else:
                groups.setdefault(said.path, {})[said.kind] = self.adapter.tensors[key]
        check_saved(self.adapter, self.merged.tensors, whole, bool(self.tied))
        self._untie(whole, groups)
        for name, tensor in whole.items():
            if not self._add_head(name, tensor):
                self._replace(name, tensor)
        levels: dict[str, list[str]] = {}
        for path in groups:
            levels.setdefault(plain(path), []).append(path)
        for module, paths in levels.items():
            parameters = config.parameters(module)
            if parameters or len(paths) > 1:
                self._update_parameters(module, paths, parameters, groups)
            else:
                self._update(module, groups[paths[0]])
        check_targets(self.adapter, self.merged.tensors, {*self.changed, *whole})
        self._describe(whole)

    def _refused(self, what: str) -> SchemaError:
        return SchemaError(f"{self.adapter.place}: {what}")

    def _describe(self, whole: Mapping[str, LazyTensor]) -> None:
        scales = ", ".join(f"rank {rank} x {scale:g}" for rank, scale in sorted(self.scales))
        note = f"{self.adapter.place}: merged into {len(self.changed)} tensors ({scales or 'rows'})"
        if whole:
            note += f", {len(whole)} more are its own"
        self.merged.notes.append(note)

    def _untie(
        self, whole: Mapping[str, LazyTensor], groups: Mapping[str, Mapping[str, LazyTensor]]
    ) -> None:
        """Give the output layer a tensor of its own where the adapter makes it differ."""
        if self.tied is None:
            return
        embedding, output = self.tied
        updates = (plain(path) + ".weight" for path, group in groups.items() if TOKENS not in group)
        trained = {self._find(name) or name for name in updates} & {*self.tied}
        touched = trained | {self._find(name) or name for name in whole} & {*self.tied}
        if not touched:
            return
        if self.adapter.config.said.get("ensure_weight_tying"):
            if trained:
                raise SchemaError(
                    f"{self.adapter.config.place}: ensure_weight_tying with an update of "
                    f"{listing(sorted(trained))} is not merged here; merge it with peft"
                )
            return
        self.merged.tensors.setdefault(output, self.merged.tensors[embedding])
        self.merged.untied = True
        self.merged.notes.append(
            f"{' and '.join(sorted(touched))} {'was' if len(touched) == 1 else 'were'} trained and "
            f"the base ties {output!r} to {embedding!r}: both are written, the model is no longer "
            "tied"
        )

    def _find(self, name: str) -> str | None:
        """Return the name that a tensor of the wrapped model has in the files of the base."""
        spellings = [name, self.name_in_files(name), name.partition(".")[2]]
        spellings += [one.replace(here, there) for one in spellings for here, there in _RENAMED]
        return next((one for one in spellings if one in self.merged.tensors), None)

    def _needed(self, name: str) -> str:
        found = self._find(name)
        if found is None:
            reason = "it is of another base model"
            if task_heads.heads_of([name], ()):
                task = self.adapter.config.said.get("task_type")
                reason = (
                    f"a head that the class of its task ({task}) adds to the base; save the base "
                    "as a model of that class, with any values in the head, and give that"
                )
            raise self._refused(f"the base has no {name!r}, which the adapter changes: {reason}")
        return found

    def _add_head(self, name: str, tensor: LazyTensor) -> bool:
        """Add a head that the class of the adapter's task has, and its base has not."""
        kind = _TASKS.get(str(self.adapter.config.said.get("task_type")))
        if kind is None or self._find(name) or not _TASK_HEAD.fullmatch(name):
            return False
        self.merged.tensors[name] = tensor
        self.merged.head, self.merged.labels = kind, tensor.shape[0]
        if output := self.merged.tensors.pop(OUTPUT, None):
            reason = f"the model is one {kind} now, which has no such layer"
            self.merged.dropped.append(Dropped(OUTPUT, reason, output.nbytes, (output,)))
        return True

    def _replace(self, name: str, tensor: LazyTensor) -> None:
        found = self._needed(name)
        base = self.merged.tensors[found]
        rows, before = (one.shape[0] if one.shape else 0 for one in (tensor, base))
        if rows > before and tensor.shape[1:] == base.shape[1:] and found.endswith(VOCABULARY):
            if self.merged.rows not in (0, rows):
                raise self._refused(
                    f"{name!r} has {rows} rows, and another tensor of the vocabulary "
                    f"{self.merged.rows}: they are not of one model"
                )
            self.merged.rows = rows
            self.merged.notes.append(
                f"{found}: the adapter has {rows} rows, the base {before}: the vocabulary was "
                "extended, and those of the adapter are taken"
            )
        elif base.shape != tensor.shape:
            raise self._refused(
                f"{name!r} is {list(tensor.shape)}, in the base "
                f"{list(base.shape)}: the adapter is of another base model"
            )
        self.merged.tensors[found] = tensor.cast(base.dtype)
        if base not in self.merged.tensors.values():
            reason = f"the adapter has its own, {self.adapter.place}"
            self.merged.dropped.append(Dropped(found, reason, base.nbytes, (base,)))

    def _update(self, module: str, group: Mapping[str, LazyTensor]) -> None:
        """Update the weight of a linear layer or of an embedding."""
        rest = dict(group)
        tokens = rest.pop(TOKENS, None)
        if tokens is not None and rest:
            raise self._refused(
                f"{module!r} has both LoRA matrices and trained rows, which "
                "cannot be merged here; merge them with peft"
            )
        if tokens is not None:
            self._replace_rows(module, tokens)
            return
        is_embedding = "lora_embedding_A" in rest
        names = ("lora_embedding_A", "lora_embedding_B")
        if not is_embedding:
            names = (f"{MATRICES[0]}.weight", f"{MATRICES[1]}.weight")
        right, left = (rest.pop(name, None) for name in names)
        magnitude, bias = rest.pop("lora_magnitude_vector", None), rest.pop("lora_B.bias", None)
        if left is None or right is None or rest:
            lacking = ", ".join(
                n for n, one in zip(names, (right, left), strict=True) if one is None
            )
            problem = f"lacks {lacking}" if lacking else f"has {listing(sorted(rest))} besides"
            raise self._refused(f"{module!r} {problem}; it is not whole")
        name = self._needed(f"{module}.weight")
        weight = self.merged.tensors[name]
        two = self._matrices(module, left, right)
        flipped = is_embedding or self._is_transposed(weight, two)
        if flipped and magnitude is not None and 4 * weight.numel > _WIDEST_NORM:
            raise self._refused(
                f"DoRA of {name!r} {list(weight.shape)} takes norms along "
                "its first axis, for which all of it is read again and again; merge it with peft"
            )
        scale = self._scale(module, right.shape[0])
        # peft rounds the update of an embedding before it adds it, and that of a layer after.
        rounded = is_embedding and magnitude is None
        how = {"flipped": flipped, "rounded": rounded}
        self._set(name, two, scale, magnitude=magnitude, **how)
        if bias is not None:
            self._update_bias(module, bias, scale)

    def _matrices(self, module: str, left: LazyTensor, right: LazyTensor) -> _Matrices:
        """Return two tensors as the matrices of an update."""
        if len(left.shape) != 2 or len(right.shape) != 2:
            raise self._refused(
                f"{module!r}: matrices {list(right.shape)} and {list(left.shape)} are those of a "
                "convolution, which is not merged here; merge it with peft"
            )
        try:
            check_ranks(left, right)
        except SchemaError as error:
            raise self._refused(f"{module!r}: {error}") from error
        return _Matrices(left, right)

    def _is_transposed(self, weight: LazyTensor, two: _Matrices) -> bool:
        """Return whether a linear layer stores [in, out]."""
        if two.shape[0] != two.shape[1]:
            return weight.shape == two.shape[::-1]
        if self.model_type:
            return self.model_type in _TRANSPOSED_LINEAR
        return bool(self.adapter.config.said.get("fan_in_fan_out"))

    def _scale(self, path: str, rank: int) -> float:
        scale = self.adapter.config.scale(path, rank)
        self.scales.add((rank, scale))
        return scale

    def _set(self, name: str, two: _Matrices, scale: float, **more: Any) -> None:
        self.merged.tensors[name] = self._sum(name, self.merged.tensors[name], two, scale, **more)
        self.changed.add(name)

    def _sum(
        self, name: str, weight: LazyTensor, two: _Matrices, scale: float, **more: Any
    ) -> LazyTensor:
        """Return a weight with an update; ``flipped`` weights are [in, out]."""
        flipped = more.pop("flipped", False)
        try:
            if not flipped:
                return updated(weight, *two, scale, weight.dtype, **more)
            if len(weight.shape) != 2:
                raise SchemaError(f"the weight is {list(weight.shape)}, expected a matrix")
            turned = updated(weight.permute((1, 0)), *two, scale, weight.dtype, **more)
            return turned.permute((1, 0))
        except SchemaError as error:
            raise self._refused(f"{name!r}: {error}") from error

    def _update_bias(self, module: str, bias: LazyTensor, scale: float) -> None:
        """Add the bias of B, scaled: a column times one."""
        name = self._find(f"{module}.bias")
        if name is None or len(bias.shape) != 1 or len(self.merged.tensors[name].shape) != 1:
            raise self._refused(
                f"{module!r} has a trained lora_bias and no bias in the base "
                "to add it to; such an adapter cannot be merged"
            )
        weight = self.merged.tensors[name]
        one = Filled("float32", (1, 1), 1.0)
        column = self._sum(name, weight.split(0, 1), _Matrices(bias.split(0, 1), one), scale)
        self.merged.tensors[name] = column.merge(0)
        self.changed.add(name)

    def _replace_rows(self, module: str, rows: LazyTensor) -> None:
        name = self._needed(f"{module}.weight")
        base = self.merged.tensors[name]
        indices = self.adapter.config.tokens(module)
        wanted = (len(indices), *base.shape[1:])
        if rows.shape != wanted or max(indices, default=-1) >= base.shape[0]:
            raise self._refused(
                f"{len(indices)} rows up to {max(indices, default=0)} of "
                f"{name!r} {list(base.shape)} are replaced, their tensor is {list(rows.shape)}"
            )
        parts: list[LazyTensor] = []
        gone: list[LazyTensor] = []
        position = 0
        for index, place in sorted((index, place) for place, index in enumerate(indices)):
            parts.append(base.narrow(0, position, index))
            parts.append(rows.narrow(0, place, place + 1).cast(base.dtype))
            gone.append(base.narrow(0, index, index + 1))
            position = index + 1
        parts.append(base.narrow(0, position, base.shape[0]))
        self.merged.tensors[name] = concat([part for part in parts if part.numel])
        size = sum(one.nbytes for one in gone)
        label = f"{name}: {len(gone)} rows"
        reason = f"the adapter has its own, {self.adapter.place}"
        self.merged.dropped.append(Dropped(label, reason, size, tuple(gone)))
        self.changed.add(name)

    def _update_parameters(
        self,
        module: str,
        paths: Sequence[str],
        parameters: list[str],
        groups: Mapping[str, Mapping[str, LazyTensor]],
    ) -> None:
        """Update what peft has wrapped as parameters: every wrapper around the one before."""
        ordered = [one for one in _STACKED if one in parameters] or parameters
        if len(ordered) != len(paths) or len(ordered) != len(parameters):
            raise self._refused(
                f"{module!r} has {len(paths)} updates, target_parameters "
                f"name {listing(parameters) if parameters else 'none'} of it: which is of which "
                "is unknown"
            )
        innermost_first = sorted(paths, key=len, reverse=True)
        for path, parameter in zip(innermost_first, ordered, strict=True):
            group = dict(groups[path])
            right, left = (group.pop(f"{name}.weight", None) for name in MATRICES)
            if left is None or right is None or group:
                raise self._refused(f"the update of {path!r} is not whole")
            self._update_parameter(module, parameter, self._matrices(module, left, right))

    def _update_parameter(self, module: str, parameter: str, two: _Matrices) -> None:
        target = f"{module}.{parameter}"
        name = self._find(target)
        if name is None:
            self._update_experts(module, parameter, two)
            return
        weight = self.merged.tensors[name]
        if len(weight.shape) == 2:
            self._set(name, two, self._scale(target, two.right.shape[0]), rounded=True)
            return
        turned, square = weight.shape[1:] != two.shape, two.shape[0] == two.shape[1]
        flipped = self.model_type in _TRANSPOSED_EXPERTS if square else turned
        scale = self._scale(target, self._rank(target, two, weight.shape[0]))
        parts = zip(unstacked(weight), two.by_expert(weight.shape[0]), strict=True)
        how = {"flipped": flipped, "rounded": True}
        self.merged.tensors[name] = stack(
            [self._sum(name, one.merge(0), own, scale, **how) for one, own in parts]
        )
        self.changed.add(name)

    def _rank(self, target: str, two: _Matrices, count: int) -> int:
        left, right = two
        if right.shape[0] % count or left.shape[1] != right.shape[0]:
            raise self._refused(
                f"{target!r}: A {list(right.shape)} and B {list(left.shape)} are not those of "
                f"{count} experts"
            )
        return right.shape[0] // count

    def _update_experts(self, module: str, parameter: str, two: _Matrices) -> None:
        """Update experts that are one tensor each in the base and stacked in the wrapped model."""
        base, target = self.merged.tensors, f"{module}.{parameter}"
        inside = module.removesuffix(_EXPERTS)
        spelt = (
            _expert_names(base, inside + place, parameter, *_ONE_BY_ONE[place])
            for place in _ONE_BY_ONE
        )
        names = next(filter(None, spelt), []) if module.endswith(_EXPERTS) else []
        if not names:
            raise self._refused(
                f"the base has neither {target} nor experts one by one, which the adapter changes: "
                "it is of another base model"
            )
        scale = self._scale(target, self._rank(target, two, len(names)))
        for parts, (mine, shared) in zip(names, two.by_expert(len(names)), strict=True):
            stops = list(accumulate(base[name].shape[0] for name in parts))
            rows = mine.shape[0]
            if stops[-1] != rows:
                theirs = "have more" if stops[-1] > rows else stops[-1]
                raise self._refused(
                    f"{target!r}: B has {rows} rows, the experts of the base {theirs}: the adapter "
                    "is of another base model"
                )
            for name, start, stop in zip(parts, (0, *stops), stops, strict=False):
                own = _Matrices(mine.narrow(0, start, stop), shared)
                self._set(name, own, scale, rounded=True)


def _expert_names(
    tensors: Mapping[str, LazyTensor], place: str, parameter: str, gate: str, up: str, down: str
) -> list[list[str]]:
    """Return the tensors that a stacked parameter is made of, expert by expert."""
    words = {"gate_up_proj": (gate, up), "down_proj": (down,)}
    found: list[list[str]] = []
    while parameter in words:
        names = [f"{place}.{len(found)}.{word}.weight" for word in words[parameter]]
        if not all(name in tensors for name in names):
            break
        found.append(names)
    return found
