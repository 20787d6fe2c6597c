"""Models in the names of GPT: Megatron's own, GPT-2, GPT-NeoX and BERT."""
