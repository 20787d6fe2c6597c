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

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ckptx.conversion import engine, worker
from ckptx.conversion.report import Report
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, ConversionError, CutShortError
from ckptx.processes.interrupts import STOPPING, Interrupts
from ckptx.processes.supervision import Failure, manner_of_death, stop
from ckptx.protocol.progress import Progress


def convert(request: ConversionRequest, progress: Progress | None = None) -> Report:
    """Convert as `engine.convert` does, in two processes.

    Raises:
        CkptxError: the first cause of a failure, on whichever side.
        Interrupted: SIGINT or SIGTERM came.
    """

    def run(request: ConversionRequest, owner: engine.TargetOwner, spool: str) -> engine.Outcome:
        with workers:  # both are gone when the target is cleaned up
            workers.send(request, spool)
            return workers.watch(owner, interrupts)

    # They start before the progress is shown, which takes a thread.
    with Interrupts() as interrupts, Workers(request.max_queue_size) as workers:
        return engine.convert(request, progress, run)


def _is_single_threaded() -> bool:
    try:
        return len(list(Path("/proc/self/task").iterdir())) == 1
    except OSError:  # no /proc: it cannot be known
        return False


def _queue(context: Any, size: int) -> worker.Bytes:
    """Return the queue of messages; without shared memory for its semaphores a pipe stands in."""
    try:
        queue: worker.Bytes = context.Queue(size)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "a pipe stands in for the queue, which needs /dev/shm: %s", error.strerror or error
        )
        return worker.PipeQueue(*context.Pipe(duplex=False))
    return queue


class _Worker:
    """A child process as its parent sees it."""

    def __init__(self, role: str, process: BaseProcess, connection: Connection) -> None:
        self.role = self.who = role
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
        except (EOFError, OSError):  # closed: its exit code says how it ended
            self.listening = False


class Workers:
    """The processes of a loader and a saver; at the end of the context nothing of them is left.

    Both are copies of this process, and have what it has imported; unless it has other threads,
    whose locks a copy would find held for ever: then they start anew.
    """

    def __init__(self, max_queue_size: int) -> None:
        self.workers: list[_Worker] = []
        context = get_context("fork") if _is_single_threaded() else get_context("spawn")
        self._idle = True
        self._queue = _queue(context, max_queue_size)
        # Children inherit the mask: a Ctrl-C cannot hit them before they are set up to ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            for role in ("loader", "saver"):
                ours, theirs = context.Pipe()
                arguments = (role, self._queue, theirs, os.getpid())
                process = context.Process(target=worker.main, args=arguments)
                process.start()
                theirs.close()
                self.workers.append(_Worker(role, process, ours))
        except BaseException:
            self.stop()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def send(self, request: ConversionRequest, spool: str) -> None:
        """Tell both what to do."""
        self._idle = False
        level = logging.getLogger().getEffectiveLevel()
        for one in self.workers:
            one.who = f"{one.role} {getattr(request, one.role)!r}"
            with contextlib.suppress(OSError):  # it has died: its exit code says how
                one.connection.send((request, level, spool))

    def watch(self, owner: engine.TargetOwner, interrupts: Interrupts) -> engine.Outcome:
        """Wait until both are done; return what the saver has done.

        Raises:
            CkptxError: the first failure of either child.
            Interrupted: a signal came.
        """
        while busy := [child for child in self.workers if not child.done]:
            lines = [child.connection for child in busy if child.listening]
            wait([interrupts.fileno(), *lines, *(child.process.sentinel for child in busy)])
            interrupts.check()
            # Liveness first: what a dead child had to say is then all in its pipe.
            dead = [child for child in busy if not child.process.is_alive()]
            failures = [failure for child in busy for failure in _failures(child, owner)]
            if failures:
                raise min(failures, key=lambda failure: failure.when).exception()
            for child in dead:
                if not child.done:
                    raise _death(child)
        interrupts.check()
        outcome: engine.Outcome = self.workers[1].result
        return outcome

    def stop(self) -> None:
        """End both."""
        workers, self.workers = self.workers, []
        for one in workers:
            if self._idle:  # nothing was begun that would have to be ended
                one.process.kill()
        stop([one.process for one in workers])
        for one in workers:
            one.connection.close()
        self._queue.close()


def _failures(child: _Worker, owner: engine.TargetOwner) -> Iterator[Failure]:
    """Do what the messages of a child ask for; yield the failures that it reports."""
    for tag, content in child.messages():
        match tag:
            case "log":
                logging.getLogger(content.name).handle(content)
            case "progress":
                owner.advance(content)
            case "planned":
                child.connection.send(owner.prepare(*content))
            case "failed":
                yield content
            case "done":
                child.done, child.result = True, content


def _death(child: _Worker) -> CkptxError:
    text = f"{child.who} {manner_of_death(child.process.exitcode)}"
    if (child.process.exitcode or 0) < 0:  # by a signal, as when memory ran out
        return CutShortError(text)
    return ConversionError(f"{text}; nothing was written")
