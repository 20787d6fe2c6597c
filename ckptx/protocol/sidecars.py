"""The config among the small files that travel beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptx.storage.source_file import json_object

CONFIG = "config.json"


def read_config(files: Mapping[str, bytes], place: object) -> dict[str, Any] | None:
    """Return the config among the sidecars of ``place``, None if there is none.

    Raises:
        FormatError: it is no JSON object.
    """
    return json_object(f"{place}/{CONFIG}", files[CONFIG]) if CONFIG in files else None


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as transformers writes it: sorted, indented by two, a newline at the end."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
