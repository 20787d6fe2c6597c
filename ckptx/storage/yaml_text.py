"""Small texts in YAML, of strangers."""

from __future__ import annotations

from typing import Any

from ckptx.errors import FormatError

_MOST = 100_000  # values of a configuration


def yaml_value(content: str | bytes, place: str) -> Any:
    """Return the value that a text in YAML is; ``place`` begins the error if it is none.

    Raises:
        FormatError: it is no valid YAML, of tags that are not plain, or says too much.
    """
    import yaml

    try:
        value = yaml.safe_load(content)
        _check_size(value)
    except RecursionError as error:
        raise FormatError(f"{place}: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise FormatError(f"{place}: {str(error)[:300]}") from error
    return value


def _check_size(value: Any) -> None:
    """Refuse more values than anybody writes; a few lines of references can say billions.

    Raises:
        ValueError: there are so many, what is referred to twice counted twice.
    """
    sizes: dict[int, int] = {}

    def size(one: Any) -> int:
        if isinstance(one, int) and one.bit_length() > 1000:
            raise ValueError("a number of it has more than 300 digits")
        if not isinstance(one, dict | list | set | tuple):
            return 1
        if id(one) not in sizes:
            sizes[id(one)] = _MOST  # until it is known: what holds itself is too large
            items = [*one, *one.values()] if isinstance(one, dict) else one
            sizes[id(one)] = 1 + sum(map(size, items))
        return sizes[id(one)]

    if size(value) >= _MOST:
        raise ValueError(f"its references say more than {_MOST} values")
