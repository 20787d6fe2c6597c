"""No code outside of schemas/families/ knows a family by its name."""

from __future__ import annotations

import ast
from pathlib import Path

from ckptx.registry import registry

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    # Formats, and classes of other software, that are called as a family is.
    "ckptx/hf_models/lora/merge.py": {"gpt2"},
    "plugins/huggingface/hf_llava.py": {"llava"},
    "plugins/megatron/__init__.py": {"llava"},
    "plugins/megatron/llava.py": {"llava"},
    # Names that Megatron's examples and converters have for models, and what they mean by them.
    "plugins/megatron/upstream_names.py": {"llama", "llava", "mistral", "mixtral", "qwen2"},
    "schemas/megatron_settings/llava.py": {"gpt", "llama", "mistral", "qwen2"},
    # Classes of Megatron-Bridge, by how their names begin.
    "schemas/megatron_settings/providers.py": {"gemma"},
    # Formats that are of these families alone.
    "plugins/meta/consolidated.py": {"mistral"},
    "schemas/conventions/meta.py": {"llama", "mistral"},
    # A protocol that names no family: what its messages are taken for.
    "ckptx/conversion/megatron_queue.py": {"llama", "mixtral", "qwen2", "qwen3"},
    # Samples that loaders and savers are tested with.
    "ckptx/testing/models.py": {
        *("gpt", "llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3"),
        "qwen3_moe",
    },
    "ckptx/testing/strategies.py": {"llama", "mistral", "qwen2", "qwen3"},
}


def test_families_are_named_in_their_files_alone():
    names = set(registry.families())
    found = {}
    for folder in ("ckptx", "plugins", "schemas"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith(("schemas/families/", "ckptx/plugins/", "ckptx/schemas/")):
                continue
            strings = {
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            if strings & names:
                found[place] = strings & names
    assert found == ALLOWED
