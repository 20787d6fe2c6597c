"""What ``adapter_config.json`` says of a LoRA adapter: its kind, its scales, what it replaces.

Source: huggingface/peft src/peft/tuners/lora/config.py, model.py (_create_and_replace),
src/peft/utils/other.py (get_pattern_key) @ v0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptx.errors import FormatError
from ckptx.storage.location import Location
from ckptx.storage.source_file import read_json

ADAPTER_CONFIG = "adapter_config.json"
_BESIDE = ("", "lora_adapter")
TRAINED_LORA = "lora_train_meta.json"
"""What verl's FSDP workers say of an adapter among their shards: r, lora_alpha, task_type.

Its keys are known from files that users of verl show; releases up to 0.7 do not write it.
"""
_PLAIN = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initial values that leave the base model as it was."""
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Those that take from the base what the adapter begins with, which leaves a residual base."""
_FOREIGN = (
    *("layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config", "megatron_config"),
)
"""Fields that make an adapter something else than an update of weights that are there."""
_LAYER = re.compile(r"\.(\d+)\.")
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "target_modules"), (list, str)),
    "trainable_token_indices": (list, dict),
}

_REPEATED = re.compile(r"\)\s*[*+?{]")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The content of the file, and where it came from, for messages."""

    said: Mapping[str, Any]
    place: str

    def refuse_unknown(self) -> None:
        """Raise a `FormatError` that names what of the config cannot be merged."""
        kind = self.said.get("peft_type")
        if kind != "LORA":
            raise FormatError(
                f"{self.place}: peft_type {kind!r} is not known, only 'LORA' (DoRA and rsLoRA are "
                "of that type); merge it with peft"
            )
        foreign = [field for field in _FOREIGN if self.said.get(field)]
        if foreign:
            raise FormatError(
                f"{self.place}: {foreign[0]} is set, which cannot be merged here; merge it with "
                "peft, if peft can"
            )

    def refuse_residual(self) -> None:
        """Raise unless the adapter belongs to the base model as it was published."""
        init = self.said.get("init_lora_weights", True)
        if any(init is known or init == known for known in _PLAIN):
            return
        if str(init).lower().startswith(_RESIDUAL):
            raise FormatError(
                f"{self.place}: init_lora_weights is {init!r}: the adapter belongs to the residual "
                "of its base model, not to the model itself; save it with "
                "path_initial_model_for_weight_conversion, or, if the base given here is that "
                "residual, set init_lora_weights to true"
            )
        raise FormatError(f"{self.place}: init_lora_weights {init!r} is not known")

    def scale(self, path: str, rank: int) -> float:
        """Return what the product of a module's matrices is multiplied by.

        Raises:
            FormatError: no alpha is known, or the rank is not the config's.
        """
        alpha = self._of_module("alpha_pattern", path, "lora_alpha")
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha) or alpha <= 0:
            raise FormatError(
                f"{self.place}: lora_alpha is {alpha!r}, expected a number above 0, without which "
                "the size of the update is unknown; give --lora-alpha"
            )
        said = self._of_module("rank_pattern", path, "r")
        if said is not None and said != rank:
            raise FormatError(
                f"{self.place}: says rank {said!r} for {path!r}, its tensors have rank {rank}: the "
                "config is of another adapter"
            )
        root = math.sqrt(rank) if self.said.get("use_rslora") else rank
        return float(alpha) / root

    def modules_to_save(self) -> tuple[str, ...]:
        """Return the modules that the adapter replaces as a whole."""
        return tuple(map(str, self._listed("modules_to_save")))

    def targets(self, module: str) -> bool:
        """Return whether peft would have given a module matrices."""
        named, excluded = self.said.get("target_modules"), self.said.get("exclude_modules") or []
        chosen = self.said.get("layers_to_transform")
        if chosen is not None:
            number = _LAYER.search(f".{module}.")
            layers = chosen if isinstance(chosen, list) else [chosen]
            if number is None or int(number[1]) not in layers:
                return False
        return _is_meant(module, named) and not _is_meant(module, excluded)

    def parameters(self, module: str) -> list[str]:
        """Return the parameters of a module that are updated as parameters, by short names."""
        found = []
        for target in map(str, self._listed("target_parameters")):
            owner, _, parameter = target.rpartition(".")
            if f".{module}".endswith(f".{owner}"):
                found.append(parameter)
        return sorted(set(found))

    def tokens(self, module: str) -> list[int]:
        """Return the rows of an embedding that the adapter replaces."""
        said = self.said.get("trainable_token_indices")
        if isinstance(said, Mapping):
            name = next((key for key in said if f".{module}".endswith(f".{key}")), None)
            # A tied output layer is replaced as the embedding is, which alone is named.
            said = said[name] if name is not None else next(iter(said.values()), None)
        whole = isinstance(said, list) and all(type(one) is int and one >= 0 for one in said)
        if not isinstance(said, list) or not whole or len(set(said)) < len(said):
            raise FormatError(
                f"{self.place}: trainable_token_indices {said!r:.60} do not say which rows of "
                f"{module!r} the adapter replaces"
            )
        return said

    def _listed(self, field: str) -> list[Any]:
        said = self.said.get(field) or []
        return [said] if isinstance(said, str) else list(said)

    def _of_module(self, patterns: str, path: str, field: str) -> Any:
        """Return a field, or what the first pattern that matches the module says instead."""
        found = self.said.get(patterns) or {}
        for pattern in found:
            try:
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return found[pattern]
            except re.error as error:
                raise FormatError(f"{self.place}: {patterns}: {pattern!r}: {error}") from error
        return self.said.get(field)


def read(path: Location) -> AdapterConfig:
    """Return the config in a file.

    Raises:
        FormatError: it is no JSON object.
    """
    said = read_json(path)
    for field, kinds in _KINDS.items():
        if said.get(field) is not None and not isinstance(said[field], kinds):
            raise FormatError(
                f"{path}: {field} is {said[field]!r:.60}, not of a type that peft writes"
            )
    config = AdapterConfig(said, str(path))
    config.refuse_unknown()
    return config


def of_checkpoint(root: Location, alpha: float | None) -> AdapterConfig:
    """Return the config of an adapter whose matrices lie in a training checkpoint.

    It lies in the directory or beside it, where peft and verl save it; without it verl's
    `TRAINED_LORA` in the directory says the scale. ``alpha`` is the user's word and goes before.

    Raises:
        FormatError: there is neither.
    """
    found = next((path for path in _places(root) if path.is_file()), None)
    if found is None and alpha is None and (root / TRAINED_LORA).is_file():
        return _trained(root / TRAINED_LORA)
    if found is None and alpha is None:
        raise FormatError(
            f"{root}: holds LoRA matrices, and nothing says their lora_alpha, which the size of "
            f"the update depends on; give --lora-alpha, or put their {ADAPTER_CONFIG} beside"
        )
    said = dict(read(found).said) if found else {"peft_type": "LORA"}
    if alpha is not None:
        said |= {"lora_alpha": alpha, "alpha_pattern": {}}
    return AdapterConfig(said, str(found) if found else "--lora-alpha")


def _trained(path: Location) -> AdapterConfig:
    """Return what verl says of the adapter that it trains: one rank and one alpha for all of it."""
    said = read_json(path)
    known = {key: said.get(key) for key in ("r", "lora_alpha", "task_type")}
    return AdapterConfig({"peft_type": "LORA", **known}, str(path))


def _places(root: Location) -> Iterator[Location]:
    for directory in (root, root.parent):
        for name in _BESIDE:
            yield directory / name / ADAPTER_CONFIG


def _is_meant(module: str, said: object) -> bool:
    """Return whether a list of names, or a pattern of whole names, means a module.

    A pattern with repeated groups is not followed: a stranger's may take forever.
    """
    if isinstance(said, str):
        if _REPEATED.search(said):
            return False
        try:
            return re.fullmatch(said, module) is not None
        except (re.error, RecursionError, OverflowError):
            return False
    return isinstance(said, list) and any(f".{module}".endswith(f".{name}") for name in said)
