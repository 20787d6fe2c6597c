"""MegatronBert of transformers: a model with random weights, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .mcore_model import BertModel

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-5,
}
PRETRAINING, MASKED_LM = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"


def token_types(tokens: torch.Tensor) -> torch.Tensor:
    """The second half of every sequence is another sentence."""
    types = torch.zeros_like(tokens)
    types[:, tokens.shape[1] // 2 :] = 1
    return types


def write(directory: Path, kind: str = PRETRAINING, **overrides: Any) -> Any:
    """Write a model with transformers, biases and norms random, too; return its config."""
    config = transformers.MegatronBertConfig(**{**SIZES, **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln." in name or "LayerNorm" in name
            parameter.normal_(std=0.1 if norm or name.endswith("bias") else 0.05)
            if norm and name.endswith("weight"):
                parameter += 1
        head = model.cls.predictions
        head.bias.copy_(head.decoder.bias)  # one and the same if embeddings are tied
    model.save_pretrained(directory)
    return config


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of tokens, and behind them those of the binary head; everything is found by name."""
    config = transformers.AutoConfig.from_pretrained(directory)
    (kind,) = config.architectures
    model, loading = getattr(transformers, kind).from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    with torch.no_grad():
        out = model.eval()(tokens, token_type_ids=token_types(tokens))
    if kind == MASKED_LM:
        return out.logits
    binary = out.seq_relationship_logits[:, None].expand(-1, tokens.shape[1], -1)
    return torch.cat([out.prediction_logits, binary], -1)


def mcore_model(
    config: Any, *, spec: str = "te", pad_to: int = 128, binary: bool = True
) -> BertModel:
    """The model of Megatron Core with these dimensions."""
    rows = -(-config.vocab_size // pad_to) * pad_to
    return BertModel(
        {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "layernorm_epsilon": config.layer_norm_eps,
            "activation_func": "gelu",
        },
        {
            "num_tokentypes": config.type_vocab_size,
            "vocab_size": rows,
            "max_sequence_length": config.max_position_embeddings,
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "add_binary_head": binary,
        },
        spec,  # type: ignore[arg-type] # one of the two
    )


def without_padding(found: torch.Tensor, vocabulary: int, binary: bool = True) -> torch.Tensor:
    """The logits without those of padding."""
    return torch.cat([found[..., :vocabulary], found[..., found.shape[-1] - 2 * binary :]], -1)
