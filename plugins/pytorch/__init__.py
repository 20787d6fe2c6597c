"""What PyTorch itself writes: state dicts in one file, and distributed checkpoints."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "dcp",
        "directories of torch.distributed.checkpoint",
        loader="ckptx.plugins.pytorch.dcp:DcpLoader",
        saver="ckptx.plugins.pytorch.dcp:DcpSaver",
        aliases=("fsdp",),
        files=(".metadata", "*.distcp", "*.safetensors", "pytorch_model_fsdp_0"),
        containers=("torch.distributed.checkpoint", "its safetensors shards"),
        layouts=("hf", "torchtitan"),
        passthrough=True,
        saves={"containers": ("torch.distributed.checkpoint",)},
    ),
    Format(
        "pytorch",
        "one state dict in a .pt file",
        loader="ckptx.plugins.pytorch.pt:PytorchLoader",
        saver="ckptx.plugins.pytorch.pt:PytorchSaver",
        files=("*.pt", "*.pth", "*.bin", "*.ckpt"),
        containers=("torch.save",),
        layouts=("hf", "mcore", "legacy"),
        passthrough=True,
    ),
)
