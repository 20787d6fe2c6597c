"""Checkpoints shaped like Llama or Mixtral, of any size, written without a tensor library."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 64 << 20  # bytes


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama, or of a Mixtral; ``groups`` are its key-value heads."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    experts: int = 0

    def config(self) -> dict[str, object]:
        """Return the ``config.json`` of the model."""
        family, name = ("mixtral", "Mixtral") if self.experts else ("llama", "Llama")
        mixture = {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return {
            **(mixture if self.experts else {}),
            "architectures": [f"{name}ForCausalLM"],
            "model_type": family,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the names and shapes of all tensors."""
        width = self.hidden // self.heads * self.groups
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield at + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield at + "self_attn.k_proj.weight", (width, self.hidden)
            yield at + "self_attn.v_proj.weight", (width, self.hidden)
            yield at + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield from self._mlp(at)
            yield at + "input_layernorm.weight", (self.hidden,)
            yield at + "post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _mlp(self, at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        places = [at + "mlp."]
        parts = ("gate_proj", "up_proj", "down_proj")
        if self.experts:
            yield at + "block_sparse_moe.gate.weight", (self.experts, self.hidden)
            places = [f"{at}block_sparse_moe.experts.{expert}." for expert in range(self.experts)]
            parts = ("w1", "w3", "w2")
        for place in places:
            yield f"{place}{parts[0]}.weight", (self.ffn, self.hidden)
            yield f"{place}{parts[1]}.weight", (self.ffn, self.hidden)
            yield f"{place}{parts[2]}.weight", (self.hidden, self.ffn)

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(int(np.prod(shape)) for _, shape in self.tensors())


SHAPES = {
    "0.44B": Shape(24, 1024, 3840, 16, 8, 32000),
    "tiny": Shape(2, 64, 176, 8, 4, 256),
    "1.26B": Shape(24, 2048, 5888, 32, 8, 32000),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "8x0.12B": Shape(10, 1024, 3584, 16, 8, 32000, experts=8),
}


def build(name: str, directory: Path, *, sparse: bool = False) -> Path:
    """Write a bf16 model of a named shape, random or all holes; keep one that is there already."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True)
    shape = SHAPES[name]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, size in sorted(shape.tensors()):
        stop = position + 2 * int(np.prod(size))
        header[tensor] = {"dtype": "BF16", "shape": size, "data_offsets": (position, stop)}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if sparse:
            file.truncate(file.tell() + position)
        else:
            for start in range(0, position, BLOCK):
                file.write(generator.bytes(min(BLOCK, position - start)))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2, sort_keys=True))
    return directory
