"""Save a Megatron LLaVA under the name that Megatron's converter gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from ckptx.errors import SchemaError
from ckptx.plugins.megatron.core_saver import CoreSaver
from ckptx.plugins.megatron.options import CAPABILITIES
from ckptx.protocol.contracts import SavePlan, Saver
from ckptx.protocol.hookspecs import hookimpl
from ckptx.protocol.messages import Begin, Message


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
