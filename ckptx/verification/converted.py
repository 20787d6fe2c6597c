"""Compare a target with the source that it was converted from, or is to be.

For ``convert --verify`` the source is read once more as the conversion read it, with its options
and ``--dtype``; the target by the loader of its own format. So a cast that was asked for is no
difference, and whatever else has changed is one. For ``--all-steps`` a target is known by its
manifest, and a sample of every tensor.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ckptx.containers.pickle_values import collector_paused
from ckptx.conversion import engine, manifest
from ckptx.conversion.keywords import bind
from ckptx.conversion.megatron_modules import ModuleSaver
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, ConversionError
from ckptx.protocol.context import Context
from ckptx.protocol.model import collect
from ckptx.protocol.progress import Progress
from ckptx.registry import registry
from ckptx.registry.open import Checkpoint, open_checkpoint
from ckptx.storage.spool import Spool, SpoolFile
from ckptx.verification.compare import Comparison, compare
from ckptx.writing import pointers
from ckptx.writing.publish import manifest_path
from ckptx.writing.replicas import holds_samples


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


@collector_paused()
def converted_before(request: ConversionRequest) -> Path | None:
    """Return the target if it is what this conversion writes, from a source that is no newer.

    Its manifest must be that of the conversion, its files there in their sizes, and what they hold
    the same: up to 1 MiB of each tensor is compared, and all that is no tensor.

    Raises:
        CkptxError: the source cannot be converted.
    """
    saver = registry.saver(request.saver, request.megatron_path)
    if isinstance(saver, ModuleSaver) or not request.target.exists():
        return None
    with SpoolFile(request.target.parent) as file, closing(Spool(file.path)) as spool:
        planned = engine.plan_conversion(request, spool)
        made, begin = planned.plan, planned.begin
        place = request.target.parent if made.single_file else request.target / made.directory
        found = place / manifest_path(made)
        sizes = {place / one.path: one.size for one in made.files}
        whole = all(one.is_file() and one.stat().st_size == sizes[one] for one in sizes)
        if not whole or not found.is_file():
            return None
        if pointers.lag(request.target, made, request.earlier or ()):
            return None
        read = (Path(path).stat().st_mtime_ns for path in begin.files if path != file.path)
        if max(read, default=0) > found.stat().st_mtime_ns:
            return None
        used = engine.versions(request)
        expected, _ = manifest.build(made, begin, {}, used, place, file.path, request.digest)
        if not manifest.same_conversion(expected, found.read_bytes()):
            return None
        if not holds_samples(made, begin.files, place):
            return None
    return request.target if made.single_file else place


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
