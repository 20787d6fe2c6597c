"""LLaVA checkpoints of transformers and of real megatron-core, and what both compute from them.

Every image is one token in what Megatron is given, and as many as it has features in what
transformers is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from . import mcore
from .mcore_model import LlavaModel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .mcore_model import Layout

IMAGE = 130
"""The token that stands for an image; the vocabulary has 131."""
_generator = torch.Generator().manual_seed(3)
TOKENS = torch.randint(0, IMAGE, (2, 8), generator=_generator)
TOKENS[:, 3] = IMAGE
IMAGES = torch.randn(2, 3, 28, 28, generator=_generator)

_LANGUAGES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
}
_TEXT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
_VISION: dict[str, Any] = {
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_TOWERS: dict[str, Any] = {
    "clip": (CLIPVisionConfig, {"hidden_size": 128, "projection_dim": 32}, -2, "default"),
    "siglip": (SiglipVisionConfig, {"hidden_size": 144}, -1, "full"),
}


def config(tower: str, language: str = "llama", **changes: Any) -> LlavaConfig:
    """Return the config of a tiny model; heads are as large as Megatron's towers have them."""
    vision, sizes, layer, select = _TOWERS[tower]
    text, more = _LANGUAGES[language]
    values = {
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
        **changes,
    }
    return LlavaConfig(
        vision_config=vision(**_VISION, **sizes), text_config=text(**_TEXT, **more), **values
    )


def write(directory: Path, config: LlavaConfig, *, seed: int = 0) -> LlavaConfig:
    """Write a checkpoint as transformers does, with random weights."""
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "layrnorm" in name
            values = torch.randn(parameter.shape, generator=generator) * (0.1 if norm else 0.05)
            parameter.copy_(values + 1 if norm and name.endswith("weight") else values)
    model.save_pretrained(directory)
    return config


def processor(directory: Path, *, chat_template: str | None = None) -> None:
    """Save a processor for the images of the CLIP tower, with a tokenizer of whole words."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<unk>", "What", "is", "this", *(f"w{n}" for n in range(4, IMAGE)), "<image>"]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    side = _VISION["image_size"]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=_VISION["patch_size"],
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token
        chat_template=chat_template,
    ).save_pretrained(directory)


def continued(directory: Path, pixels: object, tokens: list[int], count: int) -> list[int]:
    """Return how a loop over the model's own logits continues tokens about one image.

    ``pixels`` are 0 to 255, [rows, columns, 3]; mean and deviation are those of OpenAI's CLIP.
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    values = (torch.as_tensor(pixels) / 255 - mean) / deviation
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    for _ in range(count):
        with torch.no_grad():
            found = model(
                input_ids=torch.tensor([tokens]), pixel_values=values.permute(2, 0, 1)[None]
            )
        tokens = [*tokens, int(found.logits[0, -1].argmax())]
    return tokens[-count:]


def computed(directory: Path, *, image_token: int | None = None) -> dict[str, torch.Tensor]:
    """Return logits and projected features of transformers, which finds all that it looks for."""
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    if image_token is not None:
        model.config.image_token_index = image_token
    model.eval()
    seen: dict[str, torch.Tensor] = {}
    model.model.multi_modal_projector.register_forward_hook(
        lambda _module, inputs, output: seen.update(features=inputs[0], projected=output)
    )
    features = model.config.image_seq_length
    rows = [
        [one for token in row for one in [token] * (features if token == IMAGE else 1)]
        for row in TOKENS.tolist()
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows), pixel_values=IMAGES).logits
    return {"logits": logits, **seen}


def megatron(config: LlavaConfig, *, tp: int = 1, **changes: Any) -> LlavaModel:
    """Return the Megatron model that computes the same, by a hand-made table."""
    text, vision = config.text_config, config.vision_config
    layers = config.vision_feature_layer
    clip = vision.model_type == "clip_vision_model"
    language = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.hidden_size // text.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": text.model_type == "qwen2",
        "activation_func": "silu",
        "gated_linear_unit": True,
    }
    tower = {
        "num_layers": vision.num_hidden_layers + 1 + layers,
        "hidden_size": vision.hidden_size,
        "ffn_hidden_size": vision.intermediate_size,
        "num_attention_heads": vision.num_attention_heads,
        "kv_channels": vision.hidden_size // vision.num_attention_heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": vision.layer_norm_eps,
        "add_qkv_bias": True,
        "activation_func": "quick_gelu" if clip else "gelu_tanh",
    }
    projection = {
        "num_layers": 1,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "activation_func": "gelu",
        "add_bias_linear": config.multimodal_projector_bias,
    }
    gpt = {
        "vocab_size": -(-text.vocab_size // (128 * tp)) * 128 * tp,
        "max_sequence_length": text.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": text.rope_parameters["rope_theta"],
        "share_embeddings_and_output_weights": text.tie_word_embeddings,
    }
    values: dict[str, Any] = {
        "tower": "clip" if clip else "siglip",
        "vision": tower,
        "projection": projection,
        "drop_class_token": config.vision_feature_select_strategy == "default",
        "features_before_norm": not clip,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "image_token": IMAGE,
        **changes,
    }
    return LlavaModel(language, gpt, "te", **values)


_CHANNELS = {"internvit": 128, "radio": 80, "siglip": 72}
"""Channels of a head where they are not 64, as Megatron's examples fix them."""
TOWERS = ("clip", "siglip", "internvit", "internvit300M", "radio", "radio-g", "cradio-g")


def tower(
    name: str, *, heads: int = 2, stored_heads: int | None = None, **changes: Any
) -> LlavaModel:
    """Return a tiny Megatron model with a tower; it may store more heads than count."""
    channels = _CHANNELS.get(name, 64)
    vision = {
        "num_layers": 2,
        "hidden_size": heads * channels,
        "ffn_hidden_size": 80,
        "num_attention_heads": stored_heads or heads,
        "kv_channels": channels,
        "normalization": "RMSNorm" if name == "internvit" else "LayerNorm",
        "layernorm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "activation_func": "silu" if name == "radio-g" else "gelu",
        "gated_linear_unit": name == "radio-g",
    }
    radio = "radio" in name
    sizes = {
        "vision": vision,
        "tower": name,
        "drop_class_token": name != "siglip",
        "features_before_norm": False,
        "image_size": 64 if radio else 28,
        "patch_size": 32 if radio else 7,
    }
    base = config("clip")
    base.vision_config.hidden_size = heads * channels
    return megatron(base, **{**sizes, **changes})


def megatron_writes(
    model: LlavaModel,
    layout: Layout,
    directory: Path,
    *,
    format: mcore.Format = "torch_dist",
    args: Mapping[str, Any] | None = None,
    images: torch.Tensor | None = IMAGES,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint with random weights; return what the model computes, if given images."""
    said = {
        "vision_model_type": model.tower,
        "language_model_type": "tiny",
        "img_h": model.image_size,
        "img_w": model.image_size,
        "patch_dim": model.patch_size,
        "disable_vision_class_token": model.drop_class_token,
        "vocab_size": 131,
        **(args or {}),
    }
    options = {
        "seed": 0,
        "args": said,
        "args_names": "0.16",
        "iteration": 10,
        "content_metadata": {},
    }
    return _asked("write", model, layout, directory, format, options, images)


def megatron_reads(
    model: LlavaModel,
    layout: Layout,
    directory: Path,
    *,
    format: mcore.Format = "torch_dist",
    images: torch.Tensor | None = IMAGES,
) -> dict[str, torch.Tensor]:
    """Load a checkpoint at Megatron's default strictness; return what the model computes."""
    options = {"weights_only": True, "strict": True}
    return _asked("read", model, layout, directory, format, options, images)


def _asked(
    action: Any,
    model: LlavaModel,
    layout: Layout,
    directory: Path,
    format: mcore.Format,
    options: dict[str, Any],
    images: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    options = {**options, "images": None if images is None else images.numpy()}
    tokens = TOKENS.numpy()
    request = mcore.Request(action, directory, format, "te", layout, model, tokens, options)
    found = mcore.ask(request)
    return {name: torch.from_numpy(values) for name, values in found.items()}
