"""Compare a target with the source that it was converted from (``convert --verify``).

The source is read once more as the conversion read it, with its options and ``--dtype``; the target
by the loader of its own format. So a cast that was asked for is no difference, and whatever else
has changed is one.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ckptx.conversion import engine
from ckptx.conversion.keywords import bind
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, ConversionError
from ckptx.protocol.context import Context
from ckptx.protocol.model import collect
from ckptx.protocol.progress import Progress
from ckptx.registry import registry
from ckptx.registry.open import Checkpoint, open_checkpoint
from ckptx.storage.spool import Spool, SpoolFile
from ckptx.verification.compare import Comparison, compare


def compare_with_source(
    request: ConversionRequest, target: Path, progress: Progress | None = None
) -> Comparison:
    """Compare the target of a conversion with its source.

    Raises:
        ConversionError: they cannot be compared; the target stays.
    """
    try:
        return _compared(request, target, progress)
    except CkptxError as error:
        raise ConversionError(
            f"{target}: converted, and the target stays; but it was not verified: {error}"
        ) from error


def _compared(request: ConversionRequest, target: Path, progress: Progress | None) -> Comparison:
    wants = engine.wanted_by(request.saver)
    written = registry.canonical(request.saver)
    format = written if written in registry.names("loader") else registry.detect(target)
    loader = registry.loader(format, request.megatron_path, target)
    context = Context(hf_base=request.hf_base)
    own = bind(loader.options(), {})
    with SpoolFile(target.parent) as file, closing(Spool(file.path)) as spool:
        messages = engine.load(request, spool)
        source = Checkpoint(request.source, request.loader, collect(messages))
        opened = open_checkpoint(
            target, loader, options=own, wants=wants, spool=spool, context=context
        )
        return compare(source, opened, progress=progress)
