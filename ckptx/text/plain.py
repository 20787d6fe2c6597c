"""Values of frameworks as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Return a value as JSON has it; enums, dtypes and other objects become their names.

    Examples:
        >>> plain({"sizes": (1, 2), "step": 1j})
        {'sizes': [1, 2], 'step': '1j'}
    """
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):  # without importing argparse
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value).removeprefix("torch.")
