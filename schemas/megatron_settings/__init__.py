"""A model's dimensions in Megatron's words."""
