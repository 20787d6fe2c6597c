"""What the plugins for Megatron checkpoints share: directories, options, both on-disk forms."""
