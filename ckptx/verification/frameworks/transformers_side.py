"""The logits of a Hugging Face directory, computed by transformers; tokens of a text, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptx.verification.frameworks import transformers_model
from ckptx.verification.frameworks.worker import SideError, serve


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Save float32 logits [batch, sequence, vocabulary] of the tokens, or tokenise ``prompt``."""
    directory = Path(job["directory"])
    if "prompt" in job:
        if (tokenizer := transformers_model.tokenizer_of(directory)) is None:
            raise SideError(f"{directory}: holds no tokenizer; use --tokens instead of --prompt")
        return {"tokens": [list(map(int, tokenizer(job["prompt"])["input_ids"]))]}
    return save_logits(transformers_model.load(directory, "float32", "cpu"), job)


def save_logits(model: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Save what a model of transformers computes from the tokens of the job."""
    tokens = torch.from_numpy(np.load(job["tokens"]))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    np.save(job["out"], logits.float().numpy())
    return {"class": type(model).__name__}


if __name__ == "__main__":
    serve(run)
