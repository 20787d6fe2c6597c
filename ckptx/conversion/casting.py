"""Change the dtype of the tensors of a source (``--dtype``), all or those of some names.

The names that ``--dtype GLOB=DTYPE`` goes by are Hugging Face's where a schema knows the model,
whatever the formats of source and target; else those of the source. What travels may hold several
of them in one tensor, as query, key and value: that has one dtype.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckptx.errors import PlanError, SchemaError, first_few, listing
from ckptx.model.canonical_names import keys_of
from ckptx.protocol.messages import PASSTHROUGH, Begin, End, Message, Tensors
from ckptx.protocol.model import Model
from ckptx.registry.families import family_named
from ckptx.tensors.dtypes import FLOATS, dtype_name, is_widening
from ckptx.tensors.lazy import Computed, LazyTensor
from ckptx.tensors.mean import MEAN


def cast_messages(
    messages: Iterable[Message], dtype: str | None, parts: Sequence[tuple[str, str]] = ()
) -> Iterator[Message]:
    """Yield the messages with every floating-point tensor in ``dtype``; None leaves all as stored.

    ``parts`` are globs with the dtypes of what they match; the last that matches a name counts.
    Integers stay, and so do tensors that the vocabulary pins to their dtype.

    Raises:
        PlanError: a glob matches nothing, or not all names of one tensor.
    """
    if dtype is None and not parts:
        yield from messages
        return
    plain = None if dtype is None else dtype_name(dtype)
    chosen = _Parts(parts)
    for message in messages:
        match message:
            case Begin():
                chosen.names = _hf_names(message) if parts else {}
                specs = {
                    name: replace(spec, dtype=plain or spec.dtype)
                    for name, spec in message.parts.items()
                }
                yield replace(message, parts=specs)
            case Tensors():
                pinned = {key.name for key in keys_of(message.name).values() if key.pinned}
                tensors = {
                    name: chosen.cast(message.name, name, tensor, plain, name in pinned)
                    for name, tensor in message.tensors.items()
                }
                yield replace(message, tensors=tensors)
            case End():
                yield replace(message, notes=(*message.notes, *chosen.finish()))


def cast_float(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return a floating-point tensor in ``dtype``, any other as it is.

    A mean is rounded once, to ``dtype`` itself.
    """
    if isinstance(tensor, Computed) and tensor.op == MEAN:
        return replace(tensor, dtype=dtype)
    return tensor.cast(dtype) if tensor.dtype in FLOATS else tensor


class _Parts:
    """The tensors that have a dtype of their own, by their names, and what was found of them."""

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self.parts = parts
        self.names: Mapping[tuple[str, str], Sequence[str]] = {}
        """Of a message and a key the names that are matched."""
        self._seen: dict[str, None] = {}
        self._cast: dict[str, dict[str, None]] = {glob: {} for glob, _ in parts}

    def cast(
        self, message: str, key: str, tensor: LazyTensor, plain: str | None, pinned: bool
    ) -> LazyTensor:
        """Return a tensor in the dtype that its names ask for."""
        label = key if message == PASSTHROUGH else f"{message}: {key}"
        names = self.names.get((message, key), (label,))
        self._seen.update(dict.fromkeys(names if self.parts else ()))
        if pinned:
            return tensor
        found = {name: self._of(name) for name in names if self.parts}
        first = next((one for one in found.values() if one), None)
        if first is None or tensor.dtype not in FLOATS:
            return tensor if plain is None else cast_float(tensor, plain)
        glob, dtype = first
        rest = plain or tensor.dtype
        left = [name for name, one in found.items() if dtype != (one[1] if one else rest)]
        if left:
            taken = [name for name in names if name not in left]
            raise PlanError(
                f"--dtype {glob}={dtype}: takes {listing(taken, 2)} and not {listing(left, 2)}, "
                f"which are one tensor on the way, {label!r}; name all of them, or convert without "
                "and change the target by 'ckptx modify --cast'"
            )
        _check_exact(names[0], tensor, glob, dtype)
        for name, one in found.items():
            self._cast[(one or first)[0]][name] = None
        return cast_float(tensor, dtype)

    def _of(self, name: str) -> tuple[str, str] | None:
        matching = (one for one in reversed(self.parts) if fnmatch.fnmatchcase(name, one[0]))
        return next(matching, None)

    def finish(self) -> Iterator[str]:
        """Yield a note on every pattern.

        Raises:
            PlanError: one of them has matched nothing.
        """
        for glob, dtype in self.parts:
            if names := self._cast[glob]:
                yield f"--dtype {glob}={dtype}: {len(names)} tensors: {first_few([*names], 5)}"
                continue
            if matched := fnmatch.filter(self._seen, glob):
                raise PlanError(
                    f"--dtype {glob}={dtype}: {listing(matched, 3)} keep their dtype, or a later "
                    "--dtype gives them another; leave this one out"
                )
            kinds = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in self._seen)
            near = difflib.get_close_matches(glob, kinds, 5, 0.3) or list(kinds)
            raise PlanError(
                f"--dtype {glob}={dtype}: matches no tensor; there are {listing(near, 12)}"
            )


def _hf_names(begin: Begin) -> dict[tuple[str, str], Sequence[str]]:
    """Return the names that Hugging Face has for every canonical tensor, none if it has none."""
    try:
        layout = family_named(Model(begin, End()).family).layout("hf") if begin.parts else None
    except SchemaError:
        return {}
    names: dict[tuple[str, str], Sequence[str]] = {}
    for held in layout.held(begin.parts) if layout else ():
        for entry in held.rules:
            own = entry.spellings[0].named(held.layer, held.spec.num_experts or 0)
            names |= {(held.message, key): own for key in entry.keys}
    return names


def _check_exact(name: str, tensor: LazyTensor, glob: str, dtype: str) -> None:
    """Raise where a wider dtype would hold values that were rounded on the way to a narrower."""
    from ckptx.conversion.proof import operations

    if isinstance(tensor, Computed) and tensor.op == MEAN:
        return
    if dtype == tensor.dtype or not is_widening(tensor.dtype, dtype):
        return
    for step in operations(tensor):
        kind, _, what = step.partition(" ")
        if kind == "compute" or (kind == "cast" and not is_widening(*what.split(" -> "))):
            raise PlanError(
                f"--dtype {glob}={dtype}: {name!r} is rounded to {tensor.dtype} on the way "
                f"({what}) and would only be widened; convert with --dtype {dtype} alone first, "
                "then the result with these"
            )
