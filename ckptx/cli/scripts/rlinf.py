"""RLinf: its converters of FSDP's and of Megatron's checkpoints.

Source: RLinf/RLinf rlinf/utils/ckpt_convertor/{fsdp_convertor,megatron_convertor}/ @ a3816b5, which
was toolkits/ckpt_convertor/ before.
"""

from __future__ import annotations

from pathlib import Path

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, Values, flag
from ckptx.cli.scripts.torch_dcp import file_places

DCP_TO_PT = Script(
    "convert_dcp_to_pt",
    "RLinf, fsdp_convertor/convert_dcp_to_pt.py",
    (
        flag("--dcp_path", "dcp_checkpoint of a step.", SOURCE),
        flag("--output_path", "File to write.", TARGET),
    ),
    always=("--from", "dcp", "--to", "pytorch"),
    places=lambda values: file_places(values["dcp_path"], values["output_path"]),
)


def _config(values: Values) -> tuple[str]:
    name = values["config_name"]
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    return (str(Path(values["config_path"] or "") / file),)


PT_TO_HF = Script(
    "convert_pt_to_hf",
    "RLinf, fsdp_convertor/convert_pt_to_hf.py",
    (
        flag("--config-path", "Directory of the configuration."),
        flag("--config-name", "Its name, without .yaml.", default="fsdp_model_convertor"),
        flag("settings", "Settings, as convertor.torch_dtype=bf16.", many=True),
    ),
    command="from-config",
    places=_config,
    further=lambda values: values["settings"],
)

MG2HF = Script(
    "mg2hf",
    "RLinf, megatron_convertor/mg2hf_*.sh",
    (
        flag("ckpt_path_mg", "Megatron's checkpoint.", SOURCE, variable="CKPT_PATH_MG"),
        flag("ckpt_path_hf", "Directory to write.", TARGET, variable="CKPT_PATH_HF"),
        flag(
            "ckpt_path_original_hf",
            "Model that the training began with.",
            "--hf-base",
            required=True,
            variable="CKPT_PATH_ORIGINAL_HF",
        ),
    ),
    always=("--to", "hf"),
    aliases=("mg2hf_1.5b", "mg2hf_3b", "mg2hf_7b"),
)

_ONE_STEP = "there is no file in between: use 'ckptx from-script mg2hf', which is one conversion"

SCRIPTS = (
    DCP_TO_PT,
    PT_TO_HF,
    MG2HF,
    Script("convert_mg_to_middle_file", "RLinf, megatron_convertor", refused=_ONE_STEP),
    Script("convert_middle_file_to_hf", "RLinf, megatron_convertor", refused=_ONE_STEP),
)
