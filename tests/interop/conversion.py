"""Conversions in this process, the models they move, and the logits both ends compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ckptx.conversion import engine
from ckptx.conversion.report import Facts
from ckptx.conversion.request import ConversionRequest
from ckptx.registry import registry
from ckptx.writing import writer
from ckptx.writing.publish import Target
from tests.oracles import hf
from tests.oracles.mcore import Layout, Model

CLOSE = 1e-5
"""What two implementations of one model may differ by, in float32 logits."""
TOKENS = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(1))
# Rope scaling as Megatron has it changes wavelengths above 2048 positions only.
LONG_TOKENS = torch.randint(0, 131, (1, 1024), generator=torch.Generator().manual_seed(2))

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.llama, {}),
    "llama-mha": (hf.llama, {"num_key_value_heads": 8}),
    "llama-2groups": (hf.llama, {"num_key_value_heads": 2}),
    "llama-mqa": (hf.llama, {"num_key_value_heads": 1}),
    "llama-head-dim": (hf.llama, {"head_dim": 24}),
    "llama-biases": (hf.llama, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (hf.llama3_rope, {}),
    "mistral": (hf.mistral, {}),
    "mistral-window": (hf.mistral, {"sliding_window": 5}),
    "qwen2": (hf.qwen2, {}),
    "qwen2-tied": (hf.qwen2, {"tied": True}),
    "qwen3": (hf.qwen3, {}),
    "qwen3-tied": (hf.qwen3, {"tied": True}),
}

THOROUGH = ("llama-2groups", "qwen2-tied")
"""Families that everything else can go wrong with: fewer groups than ranks, a tied last stage."""

LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tp=2),
    "tp4": Layout(tp=4),
    "tp2-pp2": Layout(tp=2, pp=2),
    "pp2-vpp2": Layout(pp=2, vpp=2),
    "pp2-first1": Layout(pp=2, first=1),
    "tp2-pp2-last1": Layout(tp=2, pp=2, last=1),
    "pp3-embedding-loss": Layout(pp=3, embedding_in_split=True, loss_in_split=True),
    "tp2-pp2-layout": Layout(tp=2, pp=2, layout="Et|tt||tL"),
}
IMPLEMENTATIONS = {"te": "transformer_engine", "local": "local"}


def convert(
    source: Path,
    target: Path,
    saver: str,
    *,
    loader: str | None = None,
    loader_options: dict[str, Any] | None = None,
    dtype: str | None = None,
    hf_base: Path | None = None,
    **options: Any,
) -> Facts:
    """Convert as the pipeline does, without its processes; ``options`` are the saver's."""
    job = ConversionRequest(
        loader or registry.detect(source),
        saver,
        source,
        target,
        loader_options or {},
        options,
        dtypes=((("", dtype),) if dtype else ()),
        hf_base=hf_base,
    )
    planned = engine.plan_conversion(job)
    plan, begin = planned.plan, planned.begin
    facts = Facts.of(begin, planned.end, plan, planned.prove())
    with Target(job.target, [job.source]) as place:
        staging = place.prepare(plan)
        writer.execute(plan, begin.files, staging, engine.write_options(job))
        place.publish()
    return facts


def sizes(layout: Layout) -> dict[str, Any]:
    """The options of the core saver that ask for a layout."""
    return {
        "target_tensor_parallel_size": layout.tp,
        "target_pipeline_parallel_size": layout.pp,
        "target_virtual_pipeline_parallel_size": layout.vpp,
        "decoder_first_pipeline_num_layers": layout.first,
        "decoder_last_pipeline_num_layers": layout.last,
        "pipeline_model_parallel_layout": layout.layout,
        "account_for_embedding_in_pipeline_split": layout.embedding_in_split,
        "account_for_loss_in_pipeline_split": layout.loss_in_split,
    }


@dataclass(frozen=True)
class Source:
    """A model written by transformers."""

    name: str
    directory: Path
    config: PreTrainedConfig

    @property
    def tokens(self) -> torch.Tensor:
        return LONG_TOKENS if self.name == "llama3-rope" else TOKENS

    @cached_property
    def logits(self) -> torch.Tensor:
        return hf.logits(self.directory, self.tokens)

    def megatron(self, spec: str, layout: Layout) -> Model:
        """The Megatron model with these numbers, by the oracle's hand-made table."""
        model = hf.mcore_model(self.config, spec=spec, pad_to=128 * layout.tp)
        if getattr(self.config, "mlp_bias", False):
            return replace(model, config={**model.config, "add_bias_linear": True})
        return model


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance; infinite if anything is not a number."""
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # logits of a dead model are equal, too
    return float((found - expected).abs().nan_to_num(torch.inf).max())


def strict_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers, which finds in the files exactly what it looks for."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    assert {name: list(keys) for name, keys in loading.items() if keys} == {}
    with torch.no_grad():
        return model.eval()(tokens).logits


def grid(families: Sequence[str], layouts: Sequence[str], *axes: Sequence[str]) -> list[Any]:
    """All combinations; those that the everyday sample leaves out are marked ``full``.

    In the sample any two values of two axes meet, except that only `THOROUGH` families meet every
    layout. It is built greedily.
    """
    every = [c for c in itertools.product(families, layouts, *axes) if not _beyond_the_oracle(c)]
    missing = {pair for combination in every for pair in _pairs(combination)}
    sampled = set()
    while missing:
        best = max(every, key=lambda c: len(missing.intersection(_pairs(c))))
        sampled.add(best)
        missing.difference_update(_pairs(best))
    return [pytest.param(*c, marks=[] if c in sampled else [pytest.mark.full]) for c in every]


def _beyond_the_oracle(combination: Sequence[str]) -> bool:
    """The local spec makes the mask of a sliding window on a GPU."""
    local = any(value.startswith("local") for value in combination)
    return local and "mistral-window" in combination


def _pairs(combination: Sequence[str]) -> Iterator[Any]:
    family, layout, *_ = numbered = list(enumerate(combination))
    for pair in itertools.combinations(numbered, 2):
        if pair != (family, layout) or family[1] in THOROUGH:
            yield pair


def meaning(directory: Path) -> dict[str, Any]:
    """A config as transformers reads it: the same in the words of one version and of both."""
    config = AutoConfig.from_pretrained(directory).to_dict()
    said_twice = set(config.get("rope_parameters") or ()) | {"_name_or_path"}
    return {key: value for key, value in config.items() if key not in said_twice}


def contents(directory: Path) -> dict[str, Any]:
    """Every file below a directory, configs by their meaning, without ckptx's own manifest."""
    return {
        str(path.relative_to(directory)): meaning(path.parent)
        if path.name == "config.json"
        else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "ckptx-manifest.json"
    }
