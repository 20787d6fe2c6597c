"""A Hugging Face model directory: its small files, its config, the family that the config names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptx import manager
from ckptx.errors import FormatError, SchemaError
from ckptx.schema import Family

CONFIG = "config.json"
_SUFFIXES = {".json", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_MAX_SIDECAR = 64 << 20  # bytes; the largest published tokenizers have about 35 MB


def sidecars(directory: Path) -> dict[str, bytes]:
    """Return the small files of a model by name: config, tokenizer, chat template, code.

    Code files are carried as bytes and never imported. Weights and their indexes are not sidecars.
    """
    found = {}
    for path in sorted(directory.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.startswith(_LEGAL)
        weights = path.name.endswith(".index.json") or path.name.startswith("ckptx-")
        if not wanted or weights or not path.is_file():
            continue
        if path.stat().st_size > _MAX_SIDECAR:
            raise FormatError(
                f"{path}: {path.stat().st_size} bytes is too large for a file beside the weights; "
                "move it away"
            )
        found[path.name] = path.read_bytes()
    return found


def read_config(files: Mapping[str, bytes], place: object) -> dict[str, Any] | None:
    """Return the config among the sidecars of ``place``, None if there is none.

    Raises:
        FormatError: it is no JSON object.
    """
    if CONFIG not in files:
        return None
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}/{CONFIG}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{place}/{CONFIG}: expected a JSON object")
    return config


def base_sidecars(options: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the sidecars of the model that ``--hf-base`` names, none without it."""
    base = options.get("hf_base")
    if base is None:
        return {}
    directory = Path(base)
    if not directory.is_dir():
        raise FormatError(f"--hf-base {directory}: no such directory")
    files = sidecars(directory)
    if CONFIG not in files:
        raise FormatError(f"--hf-base {directory}: holds no {CONFIG}")
    return files


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose architecture a config names, None if no schema knows it.

    The class decides: the weights of ``LlamaForSequenceClassification`` are not those of
    ``LlamaForCausalLM``. Only a config that names no class goes by its ``model_type``.
    """
    architectures = config.get("architectures") or []
    for family in manager.families().values():
        if any(name in family.architectures for name in architectures):
            return family
        if not architectures and config.get("model_type") in family.model_types:
            return family
    return None


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        SchemaError: no schema plugin registers it.
    """
    families = manager.families()
    if name not in families:
        raise SchemaError(f"unknown model family {name!r}; known: {', '.join(sorted(families))}")
    return families[name]


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as transformers writes it: sorted, indented by two, a newline at the end."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
