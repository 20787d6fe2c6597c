"""Hugging Face model directories, PEFT adapters, and a LLaVA of Megatron's converter."""

from ckptx.protocol.declarations import Format

FORMATS = (
    Format(
        "hf",
        "model directories of transformers",
        aliases=("huggingface", "transformers", "safetensors"),
        loader="ckptx.plugins.huggingface.hf:HfLoader",
        saver="ckptx.plugins.huggingface.hf:HfSaver",
        files=("*.safetensors", "*.safetensors.index.json", "pytorch_model.bin*", "*-of-*.bin"),
        containers=("safetensors", "pytorch_model.bin"),
        layouts=("hf",),
        passthrough=True,
    ),
    Format(
        "peft",
        "LoRA adapters as peft saves them",
        loader="ckptx.plugins.huggingface.peft:PeftLoader",
        saver="ckptx.plugins.huggingface.peft:PeftSaver",
        aliases=("lora",),
        above=("deepspeed",),  # Trainer saves what was trained twice, and here as peft reads it
        files=("adapter_config.json",),
        containers=("PEFT LoRA",),
        layouts=("hf",),
        passthrough=True,
        lossless=False,  # it is merged into its base
        saves={"layouts": ("peft",), "lossless": True},
    ),
    Format(
        "hf_llava",
        "a LLaVA as Megatron's converter names it for Hugging Face",
        loader="ckptx.plugins.huggingface.hf_llava:HfLlavaLoader",
        saver="ckptx.plugins.huggingface.hf_llava:HfLlavaSaver",
        containers=("safetensors", "pytorch_model.bin"),
    ),
)
