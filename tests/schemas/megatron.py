"""Megatron's ``args`` of a model on one rank."""

from __future__ import annotations

from ckptx.model.pipeline_parallel import Pipeline
from ckptx.schemas.megatron_settings.args import args_from_spec


def args_of(spec):
    return args_from_spec(
        spec,
        tp=1,
        pipeline=Pipeline(),
        padded_vocab_size=128,
        true_vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=128,
        iteration=0,
        transformer_impl="transformer_engine",
        ckpt_format="torch_dist",
        source_args=None,
    )
