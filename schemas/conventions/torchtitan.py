"""Llama 3 and Qwen 3 as torchtitan names them in its checkpoints.

Names follow Meta's. Llama's query and key rotate neighbouring rows, as Meta's do; those of Qwen 3
rotate halves, as in Hugging Face's files. Both names of a tied weight are in a state dict.

After 0.2.2 query, key and value went below ``qkv_linear``, and ``output`` was renamed to
``lm_head``. Convention ``torchtitan`` writes the names of today, ``torchtitan-0.2`` those before;
both are read.

Source: pytorch/torchtitan torchtitan/models/{llama3,qwen3}/state_dict_adapter.py @ b5bcd76, and
torchtitan/models/{llama3,qwen3}/model/state_dict_adapter.py @ v0.2.2.
"""

from __future__ import annotations

from ckptx.model.layout import Layout, Rule, Section, rule
from ckptx.model.transforms import QKV, ROTARY_PAIRS, Transform, compose
from ckptx.schemas.conventions.blocks import qk_norm, untied

EMBEDDING = "tok_embeddings.weight"
_LAYER = "layers.{layer}."
_ATTENTION = f"{_LAYER}attention."
_MLP = f"{_LAYER}feed_forward."


def _layout(name: str, qkv: Transform, *, old: bool) -> Layout:
    projections = [
        [f"{_ATTENTION}{module}w{part}.weight" for part in "qkv"] for module in ("qkv_linear.", "")
    ]
    outputs = ["lm_head.weight", "output.weight"]
    if old:
        projections.reverse()
        outputs.reverse()
    layer: tuple[Rule, ...] = (
        rule("qkv weight", projections[0], qkv, also=[(projections[1], qkv)]),
        rule("dense weight", f"{_ATTENTION}wo.weight"),
        rule("q norm weight", f"{_ATTENTION}q_norm.weight", when=qk_norm),
        rule("k norm weight", f"{_ATTENTION}k_norm.weight", when=qk_norm),
        rule("mlp l0 weight W", f"{_MLP}w1.weight"),
        rule("mlp l1 weight", f"{_MLP}w2.weight"),
        rule("mlp l0 weight V", f"{_MLP}w3.weight"),
        rule("input norm weight", f"{_LAYER}attention_norm.weight"),
        rule("post norm weight", f"{_LAYER}ffn_norm.weight"),
    )
    return Layout(
        name,
        (
            Section("embeddings", (rule("word embeddings", EMBEDDING),)),
            Section("transformer layer {layer}", layer),
            Section("final norm", (rule("weight", "norm.weight"),)),
            Section("output layer", (rule("weight", outputs[0], also=outputs[1:], when=untied),)),
        ),
        ("freqs_cis", "rope_cache"),
    )


_INTERLEAVED = compose(QKV, ROTARY_PAIRS)
TORCHTITAN_LLAMA = {
    "torchtitan": _layout("torchtitan/llama", _INTERLEAVED, old=False),
    "torchtitan-0.2": _layout("torchtitan-0.2/llama", _INTERLEAVED, old=True),
}
TORCHTITAN_QWEN = {
    "torchtitan": _layout("torchtitan/qwen3", QKV, old=False),
    "torchtitan-0.2": _layout("torchtitan-0.2/qwen3", QKV, old=True),
}
CONVENTIONS = tuple(TORCHTITAN_LLAMA)
