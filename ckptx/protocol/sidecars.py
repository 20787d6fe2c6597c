"""The small files that travel beside the weights, the config among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptx.errors import FormatError
from ckptx.storage.source_file import LFS_POINTER, json_object

CONFIG = "config.json"
_PARSED = 1 << 20  # bytes; parsing takes about six times as much memory


def read_config(files: Mapping[str, bytes], place: object) -> dict[str, Any] | None:
    """Return the config among the sidecars of ``place``, None if there is none.

    Raises:
        FormatError: it is no JSON object.
    """
    return json_object(f"{place}/{CONFIG}", files[CONFIG]) if CONFIG in files else None


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as transformers writes it: sorted, indented by two, a newline at the end."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def check_sidecars(files: Mapping[str, bytes], place: object) -> None:
    """Raise for a file beside the weights that does not hold what its name says.

    JSON is parsed up to 1 MiB; of more the ends are looked at, and that it is text.

    Raises:
        FormatError: it is damaged, or a pointer of Git LFS.
    """
    for name, content in sorted(files.items()):
        if why := _damage(name, content):
            raise FormatError(
                f"{place}: {name} {why}; it goes along with the weights (or is that of --hf-base): "
                "copy it again, or move it away"
            )


def _damage(name: str, content: bytes) -> str:
    if content.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself"
    if name.endswith((".model", ".tiktoken")) and not content:
        return "is empty"
    if not name.endswith(".json"):
        return ""
    try:
        text = content.decode()
        if len(content) <= _PARSED:
            json.loads(text)
        elif "\0" in text or text.strip()[:1] + text.strip()[-1:] not in ("{}", "[]"):
            return "is not valid JSON: it was cut off or overwritten"
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}"
    return ""
