"""Checkpoints of RLinf."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "rlinf",
        "a step of RLinf, in whichever form it was saved",
        loader="ckptx.plugins.rlinf.loader:RlinfLoader",
        files=(
            *("actor", "model_state_dict", "full_weights.pt", "full_weigths.pt"),
            *("dcp_checkpoint", "local_shard_checkpoint", "checkpoint_rank_*.pt"),
        ),
        containers=("RLinf",),
        layouts=("hf",),
        passthrough=True,
    ),
)
