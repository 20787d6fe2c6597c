"""BERT models of real megatron-core: built as pretrain_bert.py does, and run.

Runs in a child forked by `mcore_server`, as `mcore_rank` does, which fills, loads and saves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel

from . import mcore_rank
from .bert import token_types

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .mcore_model import Layout, Model


def build(model: Model, layout: Layout) -> list[BertModel]:
    """Return this rank's model; there are no virtual stages."""
    local = model.spec == "local"
    layer = (
        bert_layer_specs.bert_layer_local_spec
        if local
        else bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
    )
    chunk = BertModel(
        mcore_rank.transformer_config(model, layout, {}),
        transformer_layer_spec=layer,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **model.gpt,
    )
    return [chunk.eval()]


def forward(
    chunks: list[BertModel], tokens: torch.Tensor, hidden_size: int, types: bool
) -> npt.NDArray[np.float32] | None:
    """Return the logits of tokens, and behind them of every one those of the binary head."""
    sentences = token_types(tokens) if types else None

    def call(chunk: Any, tokens: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        out = chunk(tokens, torch.ones_like(tokens), tokentype_ids=sentences)
        if not chunk.post_process:
            return out
        logits, binary = out
        if binary is None:
            return logits
        found.append(binary.float())
        return logits

    found: list[torch.Tensor] = []
    logits = mcore_rank.forward(chunks, tokens, hidden_size, call)
    if logits is None or not found:
        return logits
    behind = found[0][:, None].expand(-1, logits.shape[1], -1)
    return torch.cat([torch.from_numpy(logits), behind], -1).numpy()
