"""Save a Megatron LLaVA under the name that Megatron's converter gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from ckptx.errors import SchemaError
from ckptx.hookspecs import hookimpl
from ckptx.plan import SavePlan
from ckptx.plugin import Saver
from ckptx.plugins.megatron.options import CAPABILITIES
from ckptx.plugins.saver_core import CoreSaver
from ckptx.protocol import Begin, Message


class LlavaSaver(CoreSaver):
    """Writes what saver ``core`` writes, and nothing without a vision tower."""

    name = "llava"
    capabilities: Mapping[str, Any] = {**CAPABILITIES, "layouts": []}

    def plan(self, messages: Iterator[Message], options: Mapping[str, Any]) -> SavePlan:
        """Return the plan of one iteration directory below the target root."""
        first = next(messages, None)
        if isinstance(first, Begin) and "vision" not in first.parts:
            raise SchemaError("the source has no vision tower, so it is no LLaVA; use --saver core")
        return super().plan(messages if first is None else chain([first], messages), options)


@hookimpl
def register_savers(register: Callable[[Saver], None]) -> None:
    """Register the saver."""
    register(LlavaSaver())
