"""The family that a config names, and the configs and specs that it translates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ckptx.errors import CkptxError, SchemaError
from ckptx.model.family import FUNCTION_SETTINGS, LAST, Family, function_settings
from ckptx.model.layout import Parts
from ckptx.model.spec import ModelSpec
from ckptx.protocol.messages import Dropped
from ckptx.protocol.model import Model, fill_unused, named_tensors
from ckptx.protocol.sidecars import CONFIG, dump_config
from ckptx.registry import registry
from ckptx.tensors.lazy import LazyTensor

TASK_HEAD_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""How transformers' classes with such a head end."""


MAX_LAYERS = 100_000


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers")


_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose architecture a config names, None if no schema knows it.

    The class decides: the weights of ``LlamaForSequenceClassification`` are not those of
    ``LlamaForCausalLM``. Only a config that names no class goes by its ``model_type``.
    """
    return next((family for family in _named_by(config) if family.layouts), None)


def _named_by(config: Mapping[str, Any]) -> Iterator[Family]:
    architectures = _architectures(config)
    for family in registry.families().values():
        if any(name in family.architectures for name in architectures) or (
            not architectures and config.get("model_type") in family.model_types
        ):
            yield family


def why_unknown(config: Mapping[str, Any]) -> str:
    """Return why there is no schema for what a config names."""
    reasons = [why for family in _named_by(config) for why in family.refused.values()]
    if not reasons and any(name.endswith(TASK_HEAD_CLASSES) for name in _architectures(config)):
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
    families = registry.families()
    if name not in families:
        raise SchemaError(f"unknown model family {name!r}; known: {', '.join(sorted(families))}")
    return families[name]


def note_of(family: Family) -> dict[str, Any]:
    """Return what names a family in a checkpoint: its name, and which package brings it.

    ckptx's own need no package, and a model of no named family has no name to come back by.
    """
    if not family.model_types:
        return {}
    note: dict[str, Any] = {"family": family.name}
    owner = registry.family_owner(family.name)
    if owner.own:
        return note
    return {**note, "distribution": owner.distribution, "version": owner.version}


def family_noted(note: Mapping[str, Any]) -> Family | None:
    """Return the family that a checkpoint names, None where it names none.

    Raises:
        SchemaError: no installed plugin has it; the message says what to install.
    """
    if (name := note.get("family")) is None:
        return None
    if (family := registry.families().get(name)) is not None:
        return family
    if (package := note.get("distribution")) is None:
        raise SchemaError(
            f"the checkpoint is of family {name!r}, which ckptx wrote and does not have here; "
            "upgrade ckptx, or install the package that has it"
        )
    version = note.get("version") or "of no known version"
    raise SchemaError(
        f"the checkpoint is of family {name!r}, which {package} {version} reads; it is not "
        f"installed: pip install {package}"
    )


def recognised_family(spec: ModelSpec) -> Family:
    """Return the family that has what Megatron's settings say, where nothing names one.

    ckptx's own are asked first, then those of other packages, each by its `Family.recognition`;
    what none of them is, is Megatron's GPT model in general.

    Raises:
        SchemaError: two families of the same rank fit.
    """

    def rank(family: Family) -> tuple[bool, bool, int]:
        order = family.recognition or 0
        return order == LAST, not registry.family_owner(family.name).own, order

    asked = [family for family in registry.families().values() if family.recognition is not None]
    fitting = [family for family in asked if not family.config.unsupported(spec)]
    if not fitting:
        raise SchemaError("no installed plugin has a family that is what the args say")
    first, *others = sorted(fitting, key=rank)
    if tied := [family for family in others if rank(family) == rank(first)]:
        names = (
            f"{family.name} of {registry.family_owner(family.name).distribution}"
            for family in (first, *tied)
        )
        raise SchemaError(
            f"the args may be those of {' or of '.join(names)}; say which with a config (--hf-base)"
        )
    return first


def family_of_names(names: Collection[str]) -> Family | None:
    """Return the family that alone has tensors of these names in Megatron, None if any has."""
    for family in registry.families().values():
        recognised = family.megatron.recognised
        if recognised is not None and recognised(names):
            return family
    return None


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


def hf_tensors(model: Model) -> tuple[dict[str, LazyTensor], tuple[Dropped, ...]]:
    """Return the tensors of a model under Hugging Face's names, and the padding dropped.

    What such a model must have and does not use is filled, unless `fill_unused` has done so.

    Raises:
        SchemaError: they have other names and no schema knows the model.
    """
    if model.passthrough is None:
        family = family_named(model.family)
        if model.spec.extra.get(FUNCTION_SETTINGS):
            raise SchemaError(
                f"args say {function_settings(model.spec)}, which changes what the model computes "
                "and which no Hugging Face model has"
            )
        fill_unused(model, family)
        try:
            layout = family.layout("hf")
        except SchemaError as error:
            try:
                family.to_config(model.spec)
            except SchemaError as reason:  # which setting has no counterpart
                raise SchemaError(f"{error}; {reason}") from None
            raise
        return named_tensors(model, layout)
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
