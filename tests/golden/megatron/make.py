"""Make the checkpoints of this directory with real megatron-core; PROVENANCE.md says how to run it.

    python -m tests.golden.megatron.make TARGET [VERSION ...]

Every case leaves ``TARGET/<version>/<case>``, what Megatron's ``--save`` is. An element of a weight
is the number that `BASES` gives its torch_dist key, plus its place among the elements of the whole
tensor, row-major: so a test can say what belongs where without converting anything.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.oracles import bridge, mcore, mcore_versions

from .cases import BASES, BRIDGE, CASES, DENSE, MIXTURE, VERSIONS, Case

GPT: dict[str, Any] = {
    "vocab_size": DENSE["vocab_size"],
    "max_sequence_length": 16,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
}


def _model(case: Case) -> mcore.Model:
    config = {name: value for name, value in DENSE.items() if name != "vocab_size"}
    config |= {
        "add_bias_linear": False,
        "activation_func": "silu",
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
    }
    if case.mixture:
        config |= {**MIXTURE, "moe_grouped_gemm": False}
    return mcore.Model(config, GPT, case.spec)


def make(version: str, name: str, target: Path) -> None:
    """Write one case with one release."""
    case = CASES[name]
    tokens = torch.arange(4).reshape(1, 4)
    names: mcore.ArgsNames = "0.16" if mcore_versions.number(version) >= (0, 16) else "0.15"
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / name
        layout = mcore.Layout(tp=case.tp, pp=case.pp, ep=case.ep)
        mcore.write(
            *(_model(case), layout, written, tokens),
            format=case.format,
            args_names=names,
            iteration=7,
            tags=BASES,
            version=version,
        )
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(written, target / name)


def make_bridge(target: Path) -> None:
    """Write the dense model with Megatron-Bridge, which saves at iteration 0."""
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    fields = {
        **DENSE,
        "seq_length": 16,
        "should_pad_vocab": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "add_bias_linear": False,
        "activation_func": silu,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
    }
    with tempfile.TemporaryDirectory() as scratch:  # a path that says nothing of this machine
        written = Path(scratch) / "bridge"
        tokens = torch.arange(4).reshape(1, 4)
        bridge.write(written, "gpt_provider.GPTModelProvider", fields, tokens, BASES)
        config = written / "iter_0000000/run_config.yaml"
        config.write_text(config.read_text().replace(str(written), "/checkpoints"))
        shutil.copytree(written, target, dirs_exist_ok=True)


if __name__ == "__main__":
    if sys.argv[2:] == [BRIDGE]:
        make_bridge(Path(sys.argv[1]) / BRIDGE)
        sys.exit()
    for chosen in sys.argv[2:] or VERSIONS:
        for case_name in CASES:
            make(chosen, case_name, Path(sys.argv[1]) / chosen)
    mcore.stop()
