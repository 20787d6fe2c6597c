"""The one engine that every conversion runs through: the command, ``plan``, the API and the kit.

    loader.load -> edits -> cast -> saver.plan -> proof -> write -> publish
    '------- load ------'  '--- make_plan ----'  '----- save -----'

`convert` and `forecast` take these steps in this process. `ckptx.conversion.supervisor` takes the
same ones in two, with a queue behind `load`. Whichever way, a target appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ckptx.containers.pickle_values import collector_paused
from ckptx.conversion.casting import cast_messages
from ckptx.conversion.megatron_modules import ModuleSaver
from ckptx.conversion.report import Facts, Plan, Report
from ckptx.conversion.request import ConversionRequest, Other
from ckptx.errors import CkptxError, CutShortError, PlanError, PluginError, listing
from ckptx.processes.interrupts import Interrupted
from ckptx.processes.supervision import Failure
from ckptx.protocol.context import UNTOLD, WEIGHTS, Context, Wants
from ckptx.protocol.messages import Begin, End, Message
from ckptx.protocol.progress import Progress
from ckptx.protocol.sidecars import check_sidecars
from ckptx.registry import registry
from ckptx.registry.open import checkpoint_messages
from ckptx.storage.spool import Spool, SpoolFile
from ckptx.version import __version__
from ckptx.writing.publish import Target, check_files, manifest_path, outline

if TYPE_CHECKING:
    from ckptx.conversion.proof import Proof
    from ckptx.protocol.contracts import SavePlan, Saver
    from ckptx.writing.journal import Identity, Journal
    from ckptx.writing.writer import WriteOptions

Outcome: TypeAlias = tuple[Facts, str, int]
"""What was written: the facts, the digest, and the bytes that an earlier run had written."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, with the first and the last message of the source that it was made from."""

    begin: Begin
    end: End
    plan: SavePlan

    def prove(self) -> Proof:
        """Return the proof that the plan loses nothing and writes every byte once.

        Raises:
            PlanError: it does not.
        """
        from ckptx.conversion.proof import prove

        return prove(self.plan, self.begin, self.end)


class Owner(Protocol):
    """Whoever owns the target: in the command, the parent of the process that writes."""

    def prepare(self, plan: SavePlan, identity: Identity | None) -> tuple[str, bool]:
        """Return the staging directory, and whether an earlier run has published the target."""

    def advance(self, count: int) -> None:
        """Count bytes that were written."""

    def flush(self) -> None:
        """Take note that everything was written."""


class TargetOwner:
    """The owner of a target in this process, which shows the progress, too."""

    def __init__(self, target: Target, progress: Progress) -> None:
        self.target = target
        self.progress = progress
        self.advance = progress.advance

    def prepare(self, plan: SavePlan, identity: Identity | None) -> tuple[str, bool]:
        """Check the target of a plan and return where its files are staged.

        Raises:
            CkptxError: see `ckptx.writing.publish.Target.prepare`.
        """
        staging = self.target.prepare(plan, identity)
        self.progress.begin(sum(file.size for file in plan.files))
        return str(staging), self.target.published

    def flush(self) -> None:
        """Do nothing: progress was shown as it came."""


Run: TypeAlias = Callable[[ConversionRequest, TargetOwner, str], Outcome]
"""Takes a request, the owner of its target, and the path of the spool; loads, plans and saves."""


def load(request: ConversionRequest, spool: Spool | None) -> Iterator[Message]:
    """Yield the messages of the source, edited and cast.

    Raises:
        CkptxError: whatever the loader raised.
    """
    who = f"loader {request.loader!r}"
    with blamed_on(who):
        messages = _messages(request, spool)
        if request.edits is not None:
            from ckptx.conversion.edits import edited

            messages = edited(messages, request.edits, request.loader)
        messages = cast_messages(messages, request.dtype, request.parts)
    while True:
        with blamed_on(who):  # a fault of whoever takes the messages is not the loader's
            message = next(messages, None)
        if message is None:
            return
        yield message


def _messages(request: ConversionRequest, spool: Spool | None) -> Iterator[Message]:
    """Return the messages of the source, or of its mean with others."""
    wants = wanted_by(request.saver)
    own = Other(request.source, request.loader, request.loader_options)
    others = request.mean.others if request.mean else ()
    streams = [
        (
            one.path,
            checkpoint_messages(
                one.path,
                one.loader,
                options=one.options,
                context=request.context(),
                wants=wants,
                spool=spool,
                megatron_path=request.megatron_path,
            ),
        )
        for one in (own, *others)
    ]
    if request.mean is None:
        return streams[0][1]
    if not wants.weights:
        raise PlanError(
            f"saver {request.saver!r} writes adapters, and the mean of their matrices is not that "
            "of what they add; merge each onto its base (--to hf), and average the results"
        )
    from ckptx.protocol.averaging import averaged

    return averaged(streams, request.mean.weights, request.dtype)


def wanted_by(saver: str) -> Wants:
    """Return what a saver wants to be given; a Megatron-style module is not imported for it."""
    if registry.canonical(saver) not in registry.names("saver"):
        return WEIGHTS
    wants: Wants = getattr(registry.saver(saver), "wants", WEIGHTS)
    return wants


def make_plan(
    saver: Saver, messages: Iterable[Message], options: Mapping[str, Any], context: Context = UNTOLD
) -> Planned:
    """Return what a saver makes of messages.

    Raises:
        PluginError: the saver has not read all messages.
    """
    stream = WatchedMessages(iter(messages))
    made = saver.plan(iter(stream), options, context)
    return Planned(*stream.finish(saver.name), made)


def save(
    request: ConversionRequest, messages: Iterator[Message], owner: Owner, spool: str
) -> Outcome:
    """Plan, prove and write what a loader has sent; ``spool`` is the path of the spool.

    Raises:
        CkptxError: the plan is not possible, or cannot be written.
    """
    saver = registry.saver(request.saver, request.megatron_path)
    if isinstance(saver, ModuleSaver):
        return _save_by_module(saver, request, messages, owner), "", 0
    from ckptx.conversion import manifest
    from ckptx.writing import writer
    from ckptx.writing.atomic import write_durable
    from ckptx.writing.journal import identify

    with collector_paused():
        planned = _plan(saver, messages, request)
        made, begin = planned.plan, planned.begin
        check_files(made, request.target, begin.files)
        states = writer.states(begin.files)
        proved = planned.prove()
    used = versions(request)
    # What lies in the spool is gone with this run, and may come in another order in the next.
    lasting = request.resume and spool not in begin.files
    identity = identify(made, begin.files, states, used, request.digest) if lasting else None
    place, published = owner.prepare(outline(made), identity)
    facts = Facts.of(begin, planned.end, made, proved)
    if published:  # by a run that was killed before it could say so
        digest = json.loads((Path(place) / manifest_path(made)).read_bytes())["digest"]
        return facts, digest, sum(file.size for file in made.files)
    staging = Path(place)
    with writer.writing(staging, made), _journal(staging, identity, request) as journal:
        inexact = {name for names in proved.inexact.values() for name in names}
        options = write_options(request)
        written = writer.execute(
            made, begin.files, staging, options, owner.advance, journal, states, inexact
        )
        owner.flush()
        content, digest = manifest.build(
            made, begin, written.digests, used, staging, spool, request.digest
        )
        write_durable(staging / manifest_path(made), content)
    facts = replace(facts, notes=(*facts.notes, *_overflow(written.infinite)))
    return facts, digest, written.resumed


def run_here(request: ConversionRequest, owner: TargetOwner, spool_path: str) -> Outcome:
    """Load, plan and save in this process."""
    spool = Spool(spool_path)
    try:
        return save(request, load(request, spool), owner, spool_path)
    finally:
        spool.close()


def convert(
    request: ConversionRequest, progress: Progress | None = None, run: Run = run_here
) -> Report:
    """Convert a checkpoint; the target appears whole, or not at all.

    Raises:
        CkptxError: the first cause of a failure.
        Interrupted: a process that supervises others was stopped by a signal.
    """
    progress = progress or Progress()
    started = time.monotonic()
    earlier, locks = request.earlier or (), request.lock
    target = Target(request.target, request.inputs, request.overwrite, earlier, locks=locks)
    try:
        with target, SpoolFile(request.target) as spool:
            try:
                progress.stage("planning")
                owner = TargetOwner(target, progress)
                facts, digest, resumed = run(request, owner, spool.path)
                progress.stage("publishing")
                notes = target.publish()
            except (CutShortError, Interrupted, KeyboardInterrupt):
                target.keep()
                raise
    except CutShortError as error:
        if not target.published:
            error.args = (f"{error}; {target.kept or 'nothing was written'}",)
        raise
    except Interrupted as error:
        if target.kept is None:
            raise
        raise Interrupted(error.signum, str(target.kept)) from error
    finally:
        progress.close()
    moves_on = request.earlier is not None
    flag = target.plan.step_flag if moves_on or target.pointers_stay() else None
    facts = replace(facts.at(request.target, flag), notes=(*facts.notes, *notes))
    seconds = time.monotonic() - started
    return Report(request.loader, request.saver, str(target.path), facts, seconds, digest, resumed)


@collector_paused()
def forecast(request: ConversionRequest, *, tensors: bool = True) -> Plan:
    """Return what `convert` would do, without writing; every tensor by name only if asked for.

    Raises:
        CkptxError: the conversion is impossible.
    """
    from ckptx.conversion.proof import operations
    from ckptx.tensors.lazy import LazyTensor
    from ckptx.writing.writer import peak_memory

    before = _resident()
    with SpoolFile(request.target) as file:
        spool = Spool(file.path)
        planned = plan_conversion(request, spool)
        made, proof = planned.plan, planned.prove()
        spool.close()
    grown = max(0, _resident() - before)
    refusal, remarks, step_flag = _checked(request, planned)
    facts = Facts.of(planned.begin, planned.end, made, proof).at(request.target, step_flag)
    listed = [
        {
            "file": file.path,
            "name": region.name,
            "dtype": region.content.dtype,
            "shape": list(region.content.shape),
            "operations": list(operations(region.content)),
        }
        for file in (made.files if tensors else ())
        for region in file.regions
        if isinstance(region.content, LazyTensor)
    ]
    outputs = [
        {
            "path": file.path,
            "bytes": file.size,
            "tensors": sum(isinstance(region.content, LazyTensor) for region in file.regions),
        }
        for file in made.files
    ]
    return Plan(
        request.loader,
        request.saver,
        str(request.target / made.directory),
        replace(facts, notes=(*facts.notes, *remarks)),
        outputs,
        sorted(made.pointers),
        peak_memory(write_options(request)) + grown,
        spool.nbytes,
        refusal,
        listed,
    )


def plan_conversion(request: ConversionRequest, spool: Spool | None = None) -> Planned:
    """Return the plan of a conversion, without writing.

    Raises:
        CkptxError: the conversion is impossible.
    """
    saver = registry.saver(request.saver, request.megatron_path)
    return _plan(saver, load(request, spool), request)


def _plan(saver: Saver, messages: Iterator[Message], request: ConversionRequest) -> Planned:
    with blamed_on(f"saver {request.saver!r}"):
        planned = make_plan(saver, messages, request.saver_options, request.context())
    begin, written = planned.begin, {Path(file.path).name for file in planned.plan.files}
    carried = {name: data for name, data in begin.sidecars.items() if name in written}
    check_sidecars(carried, begin.root)
    return planned


def _checked(request: ConversionRequest, planned: Planned) -> tuple[str, list[str], str | None]:
    """Return why the target is refused, or remarks on it and, where a pointer stays, the flag."""
    try:
        check_files(planned.plan, request.target, planned.begin.files)
        target = Target(request.target, request.inputs, request.overwrite, request.earlier or ())
        target.check(outline(planned.plan))
    except CkptxError as error:
        return str(error), [], None
    notes = [f"replaces {target.path}: {target.replaced}"] if target.replaced else []
    stay = target.pointers_stay()
    return "", [*notes, *stay], target.plan.step_flag if stay else None


def _resident() -> int:
    """Return the bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _overflow(infinite: Mapping[str, int]) -> tuple[str, ...]:
    """Return the remark that values may not have survived a cast."""
    if not infinite:
        return ()
    count = sum(infinite.values())
    return (
        f"{count:,} elements are infinite after the cast, in {listing(infinite)}: float16 ends at "
        "65504. Cast to bfloat16 instead, or verify against the source",
    )


def _journal(
    staging: Path, identity: Identity | None, request: ConversionRequest
) -> AbstractContextManager[Journal | None]:
    from ckptx.writing.journal import NAME, Journal

    if identity is None:
        return nullcontext()
    path, every = staging.with_name(NAME), request.journal_every
    return Journal(path, identity, every, locks=request.lock)


def _save_by_module(
    saver: ModuleSaver, request: ConversionRequest, messages: Iterator[Message], owner: Owner
) -> Facts:
    """Let a Megatron-style module write the files itself."""
    from ckptx.writing.atomic import sync_tree

    stream = WatchedMessages(messages)
    plan = saver.outline(request)
    staging = Path(owner.prepare(plan, None)[0])
    proof = saver.write_directly(iter(stream), request, staging, owner.advance)
    begin, end = stream.finish(request.saver)
    owner.flush()
    sync_tree(staging)
    proof.sources, proof.dropped = len(begin.sources), end.dropped
    note = (
        f"a Megatron-style module wrote the files: what it did to the {proof.tensors} tensors it "
        "was given is not proved"
    )
    return Facts.of(begin, end, replace(plan, notes=(note,)), proof)


def write_options(request: ConversionRequest) -> WriteOptions:
    """Return the writer's options of a request."""
    from ckptx.writing.writer import WriteOptions

    return WriteOptions(request.threads, request.max_memory, request.digest, request.check_replicas)


def versions(request: ConversionRequest) -> dict[str, str]:
    """Return the versions of everything that shapes the output."""
    loaders = [
        request.loader,
        *(one.loader for one in (request.mean.others if request.mean else ())),
    ]
    chosen = registry.versions(*(("loader", name) for name in loaders), ("saver", request.saver))
    return {**chosen, "ckptx": __version__}


@contextmanager
def blamed_on(who: str) -> Iterator[None]:
    """Raise what foreign code raises, exit() included, as an error of ckptx that names it."""
    try:
        yield
    except (CkptxError, KeyboardInterrupt, Interrupted):
        raise
    except (Exception, SystemExit) as error:
        raise Failure.of(error, who).error() from error


class WatchedMessages:
    """The messages on their way to a saver; remembers the first and the last."""

    def __init__(self, messages: Iterator[Message]) -> None:
        self._messages = messages
        self._begin: Begin | None = None
        self._end: End | None = None

    def __iter__(self) -> Iterator[Message]:
        for message in self._messages:
            if isinstance(message, Begin):
                self._begin = message
            elif isinstance(message, End):
                self._end = message
            yield message

    def finish(self, saver: str) -> tuple[Begin, End]:
        """Return the first and last message, once the saver has read them all."""
        if self._begin is None or self._end is None:
            raise PluginError(f"saver {saver!r} returned before it had read all messages")
        return self._begin, self._end
