"""What the projects that save Megatron Core models write beside the tensors."""
