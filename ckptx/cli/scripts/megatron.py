"""Megatron: the checkpoint inspector. Its converter is ``convert.py``, with its own options.

Source: NVIDIA/Megatron-LM tools/checkpoint/checkpoint_inspector.py @ 00caa53.
"""

from ckptx.cli.scripts.script import SOURCE, TARGET, Script, flag, switch

_MSC = switch(
    "--enable-msc",
    "Read through the MultiStorageClient.",
    refused="checkpoints are read from files; mount or copy it",
)
_INSPECTOR = "Megatron, checkpoint_inspector"
_FSDP_DTENSOR = "fsdp_dtensor, the checkpoints of Megatron FSDP, are not written yet"

INSPECT = Script(
    "inspect",
    "Megatron, checkpoint_inspector inspect",
    (
        flag("checkpoint_dir", "The checkpoint.", SOURCE),
        _MSC,
        switch(
            "--not-ignore-param-to-group-meta",
            "Show the groups of parameters, too.",
            needless="everything that is there is shown",
        ),
    ),
    command="inspect",
    always=("--tree", "--names", "stored"),
)

PRINT_TENSOR = Script(
    "print-tensor",
    "Megatron, checkpoint_inspector print-tensor",
    (flag("checkpoint_dir", "The checkpoint.", SOURCE), flag("key", "The tensor's name.", TARGET)),
    command="print-tensor",
)

COMPARE = Script(
    "compare-two-checkpoint",
    "Megatron, checkpoint_inspector compare-two-checkpoint",
    (
        flag("checkpoint_1", "One checkpoint.", SOURCE),
        flag("checkpoint_2", "Another.", TARGET),
        _MSC,
    ),
    command="verify",
    always=("--rtol", "1e-5", "--atol", "1e-8"),
)

SCRIPTS = (
    Script(
        "checkpoint_inspector",
        "Megatron, tools/checkpoint/checkpoint_inspector.py",
        parts=(
            INSPECT,
            PRINT_TENSOR,
            COMPARE,
            Script(
                "modify-state-dict",
                "Megatron, checkpoint_inspector modify-state-dict",
                refused="Megatron's tensors are changed as Hugging Face's: convert --to hf, then "
                "'ckptx modify --remove NAME --rename FROM TO', and convert back",
            ),
            Script("convert-torch-dist-to-fsdp-dtensor", _INSPECTOR, refused=_FSDP_DTENSOR),
            Script("print-torch-dcp-in-json", _INSPECTOR, refused=_FSDP_DTENSOR),
        ),
    ),
    Script(
        "hybrid_conversion",
        "Megatron, tools/checkpoint/hybrid_conversion.py",
        refused="models of Mamba layers are not converted yet",
    ),
)
