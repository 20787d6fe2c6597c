"""The examples at the end of every command's ``--help``."""

from __future__ import annotations

EXAMPLES = {
    "convert": (
        "ckptx convert llama megatron --to core --tp 2 --pp 2",
        "ckptx convert megatron back --to hf",
        "ckptx convert llama megatron --to core --help    # with --tp, --pp and all of core",
    ),
    "plan": (
        "ckptx plan llama megatron --to core --tp 2 --pp 2",
        "ckptx plan llama megatron --to core --help    # with --tp, --pp and all of core",
    ),
    "from-config": (
        "ckptx from-config convertor.yaml",
        "ckptx from-config convertor.yaml convertor.torch_dtype=bf16 --print-only",
    ),
    "from-script": (
        "ckptx from-script --list",
        "ckptx from-script zero_to_fp32 run/checkpoint-500 model --print-only",
    ),
    "inspect": (
        "ckptx inspect megatron",
        "ckptx inspect megatron --tree",
        "ckptx inspect megatron --stats --layers 0,2-3",
    ),
    "print-tensor": (
        "ckptx print-tensor megatron model.norm.weight",
        "ckptx print-tensor llama '*.2.mlp.down_proj.weight' --slice '0, :8'",
    ),
    "verify": (
        "ckptx verify llama back",
        "ckptx verify trained exported --rtol 0.01",
        "ckptx verify copied --against-manifest copied/ckptx-manifest.json",
        "ckptx verify --logits llama megatron",
    ),
    "generate": (
        'ckptx generate model --prompt "The capital of France is"',
        'ckptx generate model --prompt-ids "1 2 3" --max-new-tokens 8',
    ),
    "modify": (
        "ckptx modify llama edited --remove lm_head.weight --dry-run",
        "ckptx modify llama edited --cast '*norm*' fp32",
    ),
    "average": (
        "ckptx average llama trained averaged --to hf",
        "ckptx average llama trained weighted --to hf --weights 0.75,0.25",
    ),
    "plugins": ("ckptx plugins",),
    "convert.py": (
        "python convert.py --model-type GPT --loader hf --saver core --load-dir llama "
        "--save-dir megatron --target-tensor-parallel-size 2",
    ),
}
"""Command to command lines that run as they stand, given the checkpoints that they name."""


def epilog(command: str) -> str:
    """Return the examples of a command as click ends its help with them."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])
