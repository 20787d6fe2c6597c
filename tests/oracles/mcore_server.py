"""The process that has imported megatron: forks one process per rank for each request."""

from __future__ import annotations

import gc
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mcore import Request


class RankError(RuntimeError):
    """A rank raised, died or took too long."""


def serve(descriptor: int, spec: str) -> None:
    """Answer requests on the socket until it closes; each answer is (succeeded, value)."""
    warnings.simplefilter("ignore")
    from . import mcore_cpu

    mcore_cpu.install(transformer_engine=spec == "te")
    from . import mcore_rank

    gc.collect()
    gc.freeze()
    connection = Connection(descriptor)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="mcore-oracle-") as scratch:
                connection.send((True, _run(request, mcore_rank.run, Path(scratch))))
        except RankError as error:
            connection.send((False, str(error)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _rank(request: Request, act: Any, rank: int, scratch: Path, pipe: int) -> None:
    """Act as one rank in a forked child, report on the pipe, and never return."""
    status = 1
    try:
        log = os.open(scratch / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        report = (True, act(request, rank, scratch))
        status = 0
    except BaseException:
        report = (False, f"rank {rank}:\n{traceback.format_exc()}")
    try:
        with os.fdopen(pipe, "wb") as stream:
            pickle.dump(report, stream)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _run(request: Request, act: Any, scratch: Path) -> Any:
    """Fork the ranks and return the one report that is not None."""
    world_size = request.layout.world_size if request.action != "args" else 1
    children: dict[int, int] = {}
    pipes: dict[int, bytearray] = {}
    selector = selectors.DefaultSelector()
    try:
        for rank in range(world_size):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                _rank(request, act, rank, scratch, writer)
            os.close(writer)
            children[rank] = pid
            pipes[rank] = bytearray()
            selector.register(reader, selectors.EVENT_READ, rank)
        return _collect(selector, pipes, scratch, time.monotonic() + request.timeout)
    finally:
        for key in list(selector.get_map().values()):
            os.close(key.fd)
        selector.close()
        for pid in children.values():
            _end(pid)


def _end(pid: int) -> None:
    """Kill a rank and the writer processes it forked, then reap it."""
    for kill, target in ((os.killpg, pid), (os.kill, pid)):
        try:
            kill(target, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(pid, 0)


def _collect(
    selector: selectors.BaseSelector, pipes: dict[int, bytearray], scratch: Path, deadline: float
) -> Any:
    answer = None
    while selector.get_map():
        ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            waiting = sorted(key.data for key in selector.get_map().values())
            raise RankError(f"ranks {waiting} did not finish in time\n{_logs(scratch, waiting)}")
        for key, _ in ready:
            data = os.read(key.fd, 1 << 20)
            pipes[key.data] += data
            if data:
                continue
            selector.unregister(key.fd)
            os.close(key.fd)
            if not pipes[key.data]:
                raise RankError(f"rank {key.data} died\n{_logs(scratch, [key.data])}")
            succeeded, report = pickle.loads(pipes[key.data])
            if not succeeded:
                raise RankError(f"{report}\n{_logs(scratch, [key.data])}")
            answer = report if report is not None else answer
    return answer


def _logs(scratch: Path, ranks: list[int]) -> str:
    logs = ((rank, scratch / f"rank{rank}.log") for rank in ranks)
    return "\n".join(
        f"output of rank {rank}: ...{log.read_text(errors='replace')[-2000:]}"
        for rank, log in logs
        if log.exists() and log.stat().st_size
    )
