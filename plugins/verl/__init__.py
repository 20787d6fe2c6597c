"""Checkpoints of verl's workers."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "verl",
        "what verl's workers save, FSDP or Megatron",
        loader="ckptx.plugins.verl.loader:VerlLoader",
        aliases=("fsdp",),
        files=(
            *("model_world_size_*_rank_*.pt", "dist_ckpt", "model", "actor"),
            "latest_checkpointed_iteration.txt",
        ),
        containers=("verl (FSDP)", "verl (Megatron)"),
        layouts=("hf",),
        passthrough=True,
    ),
)
