"""LoRA adapters: found, merged into a model, exported."""
