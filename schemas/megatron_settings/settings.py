"""Every name in Megatron's ``args``, and whether it changes what the same weights compute.

`TABLE` lists the arguments and the fields of configs of Megatron's releases; the sources of the
releases fill it (``tests/versions/megatron_settings.py``). A name's class is a judgement:

    harmless   training, parallelism, logging, kernels that compute the same
    family     expressed by a family and its `ModelSpec`
    function   changes what the weights compute; Megatron alone can hold the model
    batch      changes what a batch computes and not what the weights do: it is said
    structure  the model is of another kind, with tensors that no layout here has
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ckptx.errors import PlanError, SchemaError, listing

TABLE = Path(__file__).with_name("settings.tsv")
_OURS = {"ckptx"}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a name."""

    kind: str
    """A class; see above."""
    plain: tuple[Any, ...]
    """The values that change nothing, of a function or a structure."""
    reason: str
    """What the other values do."""
    defaults: str
    """What releases have where it is not said, separated by bars."""
    is_field: bool
    """Whether a TransformerConfig has it."""
    is_argument: bool
    """Whether Megatron's command line has it."""

    @property
    def default(self) -> Any:
        """The first of its defaults, None where there is none."""
        return next(iter(_values(self.defaults)), None)

    @property
    def is_harmless(self) -> bool:
        """Whether no value of it changes what weights compute."""
        return self.kind == "harmless"


@cache
def known() -> Mapping[str, Setting]:
    """Return the settings of all releases."""
    rows = (line.split("\t") for line in TABLE.read_text().splitlines()[1:])
    return {
        name: Setting(
            *(kind, _values(plain), reason, defaults, "config" in places, "argument" in places)
        )
        for name, kind, _, places, defaults, plain, reason in rows
    }


def _values(text: str) -> tuple[Any, ...]:
    return tuple(map(ast.literal_eval, filter(None, text.split(" | "))))


def defaults(names: Iterable[str], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """Return what names have where nothing says it: Megatron's default, unless ``otherwise``."""
    return {name: otherwise[name] if name in otherwise else known()[name].default for name in names}


def without(args: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """Return the args without those that the user accepts, whatever they are.

    Raises:
        PlanError: args have no such entry.
    """
    if missing := [name for name in accepted if name not in args]:
        raise PlanError(f"--accept-arg: the checkpoint's args have no {' and no '.join(missing)}")
    return {name: value for name, value in args.items() if name not in accepted}


def notes(args: Mapping[str, Any], accepted: Collection[str]) -> list[str]:
    """Return what was accepted, what depends on a batch, and the names that nothing is known of."""
    found = [
        f"{name} is {args[name]!r} in args and was ignored (--accept-arg)" for name in accepted
    ]
    found += [
        f"{name} is {args[name]!r} in args: {known()[name].reason}"
        for name in sorted(known().keys() & args)
        if known()[name].kind == "batch" and args[name] and name not in accepted
    ]
    if names := [name for name in unknown(args) if name not in accepted]:
        found.append(
            f"args hold {listing(names)}, which no release of Megatron has: whether the weights "
            "compute the same without is not known"
        )
    return found


def changing(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change what a model of an expressible structure computes.

    Raises:
        SchemaError: the model is of another structure.

    Examples:
        >>> changing({"softmax_scale": 0.5, "use_mup": False, "lr": 1.0})
        {'softmax_scale': 0.5}
    """
    found = {}
    for name, value in args.items():
        setting = known().get(name)
        if setting is None or value is None or value in setting.plain:
            continue
        if setting.kind == "structure" and value:
            raise SchemaError(
                f"{setting.reason} ({name} is {value!r} in args) cannot be converted yet"
            )
        if setting.kind == "function":
            found[name] = value
    return found


def unknown(args: Mapping[str, Any]) -> list[str]:
    """Return the names that say something and that no release of Megatron has."""
    return sorted(
        name for name, value in args.items() if value and name not in _OURS | known().keys()
    )
