"""Mixtral, as Hugging Face names it.

Its own prefix of experts is that of files; transformers 5 calls the module ``mlp`` in memory.

Source: huggingface/transformers src/transformers/models/mixtral/*.py @ v5.23.0.
"""

from __future__ import annotations

from ckptx.model.layout import Rule
from ckptx.schemas.config.experts import Mixture
from ckptx.schemas.config.traits import ConfigTable
from ckptx.schemas.conventions.hf_experts import experts_of, router
from ckptx.schemas.conventions.legacy import NOT_LEGACY
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.dense.mistral import DEFAULTS


def _experts(prefix: str) -> tuple[Rule, ...]:
    own = f"{prefix}block_sparse_moe."
    return (
        router(f"{own}gate.weight", f"{prefix}mlp.gate.weight"),
        *experts_of(own, "w1", "w3", "w2"),
    )


FAMILY = decoder_family(
    "mixtral",
    ConfigTable(
        "MixtralForCausalLM",
        DEFAULTS | {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None},
        windows="all layers",
        experts=Mixture(
            {"num_local_experts": 8, "num_experts_per_tok": 2},
            count="num_local_experts",
            ffn="intermediate_size",
            spellings=("num_experts",),
            normalized=True,
        ),
    ),
    mlp=_experts,
    refused={"legacy": NOT_LEGACY["experts"]},
    recognition=30,
)
