r"""Run a conversion: a loader and a saver in two processes, watched by this one.

       loader process  --- queue of messages --->  saver process
              \                                      /
               log, failure                log, failure, progress,
                      \                    "planned", result
                       '--> this process <--'
                    owns the target, the spool and the signals

Two processes isolate plugins that rewrite ``sys.argv``, leak or crash; they make nothing faster,
since messages are references. Whatever happens to one child, the other is stopped and the first
cause is raised. If this process is killed, both children die. What was staged of the target is
removed, unless the conversion was cut short and another run can continue it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptx.containers.pickle_values import collector_paused
from ckptx.conversion import worker
from ckptx.conversion.megatron_modules import ModuleSaver
from ckptx.conversion.report import Facts, Forecast, Report
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, ConversionError, CutShortError, PlanError
from ckptx.processes.interrupts import STOPPING, Interrupted, Interrupts
from ckptx.processes.supervision import Failure, manner_of_death, stop
from ckptx.protocol.progress import Progress, Silent
from ckptx.registry import registry
from ckptx.storage.spool import Spool, SpoolFile
from ckptx.writing.publish import Target, check_files, outline

if TYPE_CHECKING:
    from ckptx.conversion.proof import Proof
    from ckptx.protocol.contracts import SavePlan
    from ckptx.protocol.messages import Begin, End


def convert(job: ConversionRequest, progress: Progress | None = None) -> Report:
    """Convert a checkpoint; the target appears whole, or not at all.

    Raises:
        CkptxError: the first cause of a failure, on whichever side.
        Interrupted: SIGINT or SIGTERM came.
    """
    progress = progress or Silent()
    started = time.monotonic()
    target = Target(job.target, _inputs(job), job.overwrite)
    try:
        with Interrupts() as interrupts, target, SpoolFile(job.target) as spool:
            try:
                progress.stage("planning")
                with _workers(job, spool.path) as crew:
                    facts, digest, resumed = _Supervisor(crew, target, progress, interrupts).run()
                progress.stage("publishing")
                notes = target.publish()
            except (CutShortError, Interrupted):
                target.keep()
                raise
    except CutShortError as error:
        raise _saying(error, target) from error
    except Interrupted as error:
        if target.kept is None:
            raise
        raise Interrupted(error.signum, str(target.kept)) from error
    finally:
        progress.close()
    facts = replace(facts.at(job.target), notes=(*facts.notes, *notes))
    seconds = time.monotonic() - started
    return Report(job.loader, job.saver, str(target.path), facts, seconds, digest, resumed)


def _saying(error: CutShortError, target: Target) -> CutShortError:
    """Return an error that says what is left of the conversion."""
    told = CutShortError(f"{error}; {target.kept or 'nothing was written'}")
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told


@collector_paused()
def plan_conversion(
    job: ConversionRequest, spool: Spool | None = None
) -> tuple[Begin, End, SavePlan, Proof]:
    """Plan and prove a conversion in this process, without writing.

    Raises:
        CkptxError: the conversion is impossible.
    """
    from ckptx.conversion.proof import prove

    saver = registry.saver(job.saver, job.megatron_path)
    if isinstance(saver, ModuleSaver):
        raise PlanError(f"saver {job.saver!r} is a Megatron-style module, which cannot be planned")
    stream = worker.CheckedMessages(worker.changed(worker.messages_of(job, spool), job))
    plan = saver.plan(worker.recast(stream, job), job.options(job.saver_options))
    begin, end = stream.finish(job.saver)
    return begin, end, plan, prove(plan, begin, end)


@collector_paused()
def forecast(job: ConversionRequest, *, tensors: bool = True) -> Forecast:
    """Return what `convert` would do, without writing; every tensor by name only if asked for."""
    from ckptx.conversion.proof import operations
    from ckptx.tensors.lazy import LazyTensor
    from ckptx.writing.writer import peak_memory

    before = _resident()
    with SpoolFile(job.target) as file:
        begin, end, plan, proof = plan_conversion(job, Spool(file.path))
        spooled = file.nbytes
    planned = max(0, _resident() - before)
    listed = [
        {
            "file": file.path,
            "name": region.name,
            "dtype": region.content.dtype,
            "shape": list(region.content.shape),
            "operations": list(operations(region.content)),
        }
        for file in (plan.files if tensors else ())
        for region in file.regions
        if isinstance(region.content, LazyTensor)
    ]
    outputs = [
        {
            "path": file.path,
            "bytes": file.size,
            "tensors": sum(isinstance(region.content, LazyTensor) for region in file.regions),
        }
        for file in plan.files
    ]
    return Forecast(
        job.loader,
        job.saver,
        str(job.target / plan.directory),
        Facts.of(begin, end, plan, proof).at(job.target),
        outputs,
        sorted(plan.pointers),
        peak_memory(worker.write_options(job)) + planned,
        spooled,
        _refusal(job, plan, begin),
        listed,
    )


def _resident() -> int:
    """Return the bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _refusal(job: ConversionRequest, plan: SavePlan, begin: Begin) -> str:
    try:
        check_files(plan, job.target, begin.files)
        Target(job.target, _inputs(job), job.overwrite).check(outline(plan))
    except CkptxError as error:
        return str(error)
    return ""


def _inputs(job: ConversionRequest) -> list[Path]:
    adapters = map(Path, job.loader_options.get("adapter") or ())
    return [job.source, *([job.hf_base] if job.hf_base else []), *adapters]


class _Worker:
    """A child process as its parent sees it."""

    def __init__(self, role: str, name: str, process: SpawnProcess, connection: Connection) -> None:
        self.who = f"{role} {name!r}"
        self.process = process
        self.connection = connection
        self.result: Any = None
        self.done = False
        self.listening = True

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Yield what has arrived."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):  # closed: the sentinel tells how it ended
            self.listening = False


@contextmanager
def _workers(job: ConversionRequest, spool: str) -> Iterator[list[_Worker]]:
    """Start both children; on the way out nothing of them is left."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(job.max_queue_size)
    crew: list[_Worker] = []
    # Children inherit the mask: a Ctrl-C cannot hit them before they are set up to ignore it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        for role in ("loader", "saver"):
            ours, theirs = context.Pipe()
            level = logging.getLogger().getEffectiveLevel()
            arguments = (role, job, queue, theirs, os.getpid(), level, spool)
            process = context.Process(target=worker.main, args=arguments)
            process.start()
            theirs.close()
            crew.append(_Worker(role, getattr(job, role), process, ours))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield crew
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        stop([child.process for child in crew])
        for child in crew:
            child.connection.close()
        queue.close()


class _Supervisor:
    """Watches a crew until both are done, or one has failed."""

    def __init__(
        self, crew: list[_Worker], target: Target, progress: Progress, interrupts: Interrupts
    ) -> None:
        self.crew = crew
        self.target = target
        self.progress = progress
        self.interrupts = interrupts
        self.failures: list[Failure] = []

    def run(self) -> worker.Outcome:
        """Return what the saver has done.

        Raises:
            CkptxError: the first failure of either child.
            Interrupted: a signal came.
        """
        while not all(child.done for child in self.crew):
            busy = [child for child in self.crew if not child.done]
            lines = [child.connection for child in busy if child.listening]
            wait([self.interrupts.fileno(), *lines, *(child.process.sentinel for child in busy)])
            self.interrupts.check()
            # Liveness first: what a dead child had to say is then all in its pipe.
            dead = [child for child in busy if not child.process.is_alive()]
            for child in busy:
                for tag, content in child.messages():
                    self._on_message(child, tag, content)
            if self.failures:
                raise min(self.failures, key=lambda failure: failure.when).exception()
            for child in dead:
                if not child.done:
                    raise _death(child)
        self.interrupts.check()
        outcome: worker.Outcome = self.crew[1].result
        return outcome

    def _on_message(self, child: _Worker, tag: str, content: Any) -> None:
        match tag:
            case "log":
                logging.getLogger(content.name).handle(content)
            case "progress":
                self.progress.advance(content)
            case "planned":
                outline, identity = content
                place = self.target.prepare(outline, identity)
                self.progress.begin(sum(file.size for file in outline.files))
                child.connection.send((str(place), self.target.published))
            case "failed":
                self.failures.append(content)
            case "done":
                child.done, child.result = True, content


def _death(child: _Worker) -> CkptxError:
    text = f"{child.who} {manner_of_death(child.process.exitcode)}"
    if (child.process.exitcode or 0) < 0:  # by a signal, as when memory ran out
        return CutShortError(text)
    return ConversionError(f"{text}; nothing was written")
