"""Hugging Face model directories and PEFT adapters."""
