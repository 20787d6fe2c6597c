"""Files that PyTorch writes: plain ``.pt`` and ``torch.distributed.checkpoint``."""
