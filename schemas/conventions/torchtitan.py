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

from ckptx.model.layout import Layout, rule
from ckptx.model.transforms import QKV, ROTARY_PAIRS, Transform, compose
from ckptx.schemas.conventions.blocks import qk_norm, untied
from ckptx.schemas.conventions.meta import ATTENTION, EMBEDDING, after_meta

__all__ = ["CONVENTIONS", "EMBEDDING", "TORCHTITAN_LLAMA", "TORCHTITAN_QWEN"]


def _layout(name: str, qkv: Transform, *, old: bool) -> Layout:
    projections = [
        [f"{ATTENTION}{module}w{part}.weight" for part in "qkv"] for module in ("qkv_linear.", "")
    ]
    outputs = ["lm_head.weight", "output.weight"]
    if old:
        projections.reverse()
        outputs.reverse()
    return after_meta(
        name,
        rule("qkv weight", projections[0], qkv, tp=0, also=[(projections[1], qkv)]),
        rule("weight", outputs[0], tp=0, also=outputs[1:], when=untied),
        *(rule(f"{p} norm weight", f"{ATTENTION}{p}_norm.weight", when=qk_norm) for p in "qk"),
        ignored="freqs_cis rope_cache",
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
