"""Whether an adapter holds all that its config says it does, as far as the base tells.

Source: huggingface/peft src/peft/tuners/tuners_utils.py (check_target_module_exists) @ v0.21.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from ckptx.errors import SchemaError, listing
from ckptx.hf_models.lora.extract import Adapter
from ckptx.hf_models.lora.names import MATRICES, VECTORS
from ckptx.tensors.lazy import LazyTensor

_EXPERTS = re.compile(r"\.experts\.(\d+\.)?(?P<word>\w+)(\.weight)?$")
_STACKED = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), ("gate_up_proj",)) | {
    "w2": ("down_proj",)
}
"""The parameters that hold tensors of single experts where these are stacked."""
_NUMBER = re.compile(r"\d+")
_PAIRS = ((f"{MATRICES[0]}.weight", f"{MATRICES[1]}.weight"), VECTORS[:2])


def check_saved(
    adapter: Adapter, base: Mapping[str, LazyTensor], whole: Collection[str], tied: bool
) -> None:
    """Check that modules of ``modules_to_save`` that the base has are among those saved whole.

    Raises:
        SchemaError: one is not.
    """
    kept = bool(adapter.config.said.get("ensure_weight_tying"))
    for module in adapter.config.modules_to_save():
        inside = f".{module}."
        if any(inside in f".{name}" for name in whole):
            continue
        here = [name for name in base if inside in f".{name}"]
        if here and not (kept and tied):
            raise SchemaError(
                f"{adapter.place}: modules_to_save names {module!r}, and the adapter holds "
                f"nothing of {here[0]!r}; it was not saved as a whole"
            )


def check_targets(
    adapter: Adapter, base: Mapping[str, LazyTensor], changed: Collection[str]
) -> None:
    """Check that all that the adapter's config names of the base is among the ``changed``.

    These are matrices that ``target_modules`` names, and experts that ``target_parameters`` does,
    stacked or one by one. Experts as modules of their own count where some of them are changed: in
    memory most models have none.

    Raises:
        SchemaError: the adapter has nothing of one.
    """
    experts = {_NUMBER.sub("#", name) for name in changed if ".experts." in name}
    lacking = [name for name in base if name not in changed and _is_wanted(name, adapter, experts)]
    lacking = [
        name.removesuffix(".weight")
        for name in lacking
        if len(base[name].shape) == 2 or _EXPERTS.search(name)
    ]
    if lacking:
        raise SchemaError(
            f"{adapter.place}: target_modules names {listing(lacking, 3)}, and the adapter has no "
            "matrices of them; save it again, or, if they were not trained, take them from its "
            "target_modules (exclude_modules, layers_to_transform)"
        )


def _is_wanted(name: str, adapter: Adapter, experts: Collection[str]) -> bool:
    """Return whether an adapter changes a tensor; ``experts`` are the kinds that it changes."""
    config = adapter.config
    module = name.removesuffix(".weight")
    if expert := _EXPERTS.search(name):
        owner = f"{name[: expert.start()]}.experts".replace(".block_sparse_moe.", ".mlp.")
        word = expert["word"]
        if {word, *_STACKED.get(word, ())}.intersection(config.parameters(owner)):
            return True
        if _NUMBER.sub("#", name) not in experts:
            return False
    return (name.endswith(".weight") or bool(expert)) and config.targets(module)


def check_alone(adapter: Adapter) -> None:
    """Check an adapter without its base: every update is whole, and parts of a module are alike.

    Where some layers have matrices of ``self_attn.q_proj`` and ``v_proj``, none has those of one
    of them alone. What all layers lack cannot be told.

    Raises:
        SchemaError: something is missing.
    """
    kinds: dict[str, set[str]] = {}
    for said in adapter.names().values():
        kinds.setdefault(said.path, set()).add(said.kind)
    for path, held in kinds.items():
        for first, second in _PAIRS:
            if (first in held) != (second in held):
                lacks = second if first in held else first
                raise SchemaError(f"{adapter.place}: {path!r} lacks {lacks}; it is not whole")
    parts: dict[str, dict[str, set[str]]] = {}
    for path in (path for path, held in kinds.items() if _PAIRS[0][0] in held):
        owner, _, part = path.rpartition(".")
        parts.setdefault(_NUMBER.sub("#", owner), {}).setdefault(owner, set()).add(part)
    for owners in parts.values():
        (usual, _), *_ = Counter(map(frozenset, owners.values())).most_common(1)
        for owner, held in owners.items():
            if usual > held:
                lacks = listing(f"{owner}.{part}" for part in sorted(usual - held))
                raise SchemaError(
                    f"{adapter.place}: holds no matrices of {lacks}, which other layers have; it "
                    "was not saved whole"
                )
