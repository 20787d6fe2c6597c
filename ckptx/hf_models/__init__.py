"""A library for Hugging Face model directories and LoRA adapters."""
