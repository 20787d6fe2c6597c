"""OpenVLA-OFT: modules that are loaded from files of their own beside the model.

No layout describes such a model: its tensors keep their names. What OpenVLA-OFT reads apart is
written as RLinf writes it, to files named for the step, and stays in the model's weights, too.

    proprio_projector--10_checkpoint.pt     fc1.weight, ...: without the module's own name
    action_head--10_checkpoint.pt           noisy_action_projector--10_checkpoint.pt
    vision_backbone--10_checkpoint.pt       only with FiLM, whose model is not transformers' then

Source: RLinf/RLinf rlinf/utils/ckpt_convertor/fsdp_convertor/utils.py (openvla_oft_save_helper) @
a3816b5; moojink/openvla-oft vla-scripts/finetune.py, prismatic/models/film_vit_wrapper.py @ main.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptx.protocol.contracts import SideFile

_MODULES = ("action_head", "noisy_action_projector", "proprio_projector")
_VISION = "vision_backbone"
_FILM = (".scale.weight", ".shift.weight")


def side_files(
    config: Mapping[str, Any], names: Sequence[str], iteration: int | str
) -> Sequence[SideFile]:
    """Return a file for each module that OpenVLA-OFT loads by itself."""
    classes = config.get("architectures") or []
    if config.get("model_type") != "openvla" and not any("OpenVLA" in str(c) for c in classes):
        return []
    vision = [name for name in names if name.startswith(f"{_VISION}.")]
    film = all(any(name.endswith(ending) for name in vision) for ending in _FILM)
    step = 0 if iteration == "release" else iteration
    files = []
    for module in (*_MODULES, *((_VISION,) if film else ())):
        prefix = f"{module}."
        held = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if held:
            files.append(SideFile(f"{module}--{step}_checkpoint.pt", held, keep=True))
    return files
