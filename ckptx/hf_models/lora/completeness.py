"""Whether an adapter holds all that its config says it does, as far as the base tells.

Source: huggingface/peft src/peft/tuners/tuners_utils.py (check_target_module_exists) @ v0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckptx.errors import SchemaError, listing
from ckptx.hf_models.lora.extract import Adapter
from ckptx.tensors.lazy import LazyTensor


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
    """Check that every matrix of the base that ``target_modules`` names is among the ``changed``.

    Experts are left out: in memory they are stacked parameters, or modules.

    Raises:
        SchemaError: the adapter has nothing of one.
    """
    lacking = [
        module
        for name, tensor in base.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and ".experts." not in name
        if name not in changed and adapter.config.targets(module := name.removesuffix(".weight"))
    ]
    if lacking:
        raise SchemaError(
            f"{adapter.place}: target_modules names {listing(lacking, 3)}, and the adapter has no "
            "matrices of them; save it again, or, if they were not trained, take them from its "
            "target_modules (exclude_modules, layers_to_transform)"
        )
