"""Weights of Llama as Meta publishes them, and of Mistral as Mistral does."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "meta",
        "consolidated weights of Llama and Mistral",
        loader="ckptx.plugins.meta.consolidated:MetaLoader",
        saver="ckptx.plugins.meta.consolidated:MetaSaver",
        files=("params.json",),
        containers=("consolidated.NN.pth", "consolidated.safetensors"),
        layouts=("meta",),
        parallel=("tp",),
    ),
)
