"""Checkpoints of DeepSpeed."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "deepspeed",
        "ZeRO, AutoTP, PipelineModule and universal checkpoints",
        loader="ckptx.plugins.deepspeed.loader:DeepspeedLoader",
        aliases=("zero", "universal"),
        above=("hf",),  # Trainer has gathered the module's weights, and the masters are here
        files=("*_model_states.pt", "*/*_model_states.pt"),
        containers=("DeepSpeed ZeRO 0 to 3", "AutoTP", "PipelineModule", "DeepSpeed universal"),
        layouts=("hf",),
        passthrough=True,
    ),
)
