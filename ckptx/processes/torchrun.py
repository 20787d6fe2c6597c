"""One writer where a command was started once per rank, as by ``torchrun``.

verl's and LightRFT's scripts are started with one process per GPU. Of ckptx one process does the
work, rank 0; the others wait for it and exit with its code.

    rank 0     listens, works, sends its exit code to everyone who connects
    others     connect, wait; whatever ends rank 0, the kernel closes their line

The line is a socket in Linux's abstract namespace, so no file is left and none can be stale. Ranks
of another machine cannot hear rank 0: they do nothing, say so, and exit with 0; the code of the
machine of rank 0 counts.

Source of the variables: torch:torch/distributed/run.py @ v2.13.0. Kubernetes' PyTorchJob sets RANK
and WORLD_SIZE for whole machines, and no LOCAL_RANK: commands typed there are not waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import socket

PATIENCE = 60.0
"""Seconds in which all must have been started: interpreters start slowly on clusters."""
_SILENCE = 5.0  # seconds after which one that waits says so
_POLL = 0.05  # seconds
_RUN = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where this process stands among those that were started together."""

    rank: int
    local_rank: int
    local_world: int
    """Processes on this machine."""

    @property
    def with_rank_0(self) -> bool:
        """Whether rank 0 is on this machine; ranks are numbered machine by machine."""
        return self.rank == self.local_rank


def rank_place(environment: Mapping[str, str]) -> RankPlace | None:
    """Return this process's place, None if it was not started together with others."""
    found = [environment.get(name, "") for name in _NUMBERS]
    if not all(value.isdecimal() for value in found):
        return None
    rank, world, local_rank = map(int, found)
    if world < 2:
        return None
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return RankPlace(rank, local_rank, int(local) if local.isdecimal() else world)


def once(words: Sequence[str], work: Callable[[], int]) -> int:
    """Let one rank do the work; return its exit code in every process of the machine.

    Args:
        words: the command, which identifies the ranks that belong together.
        work: what to do; returns an exit code.
    """
    if (here := rank_place(os.environ)) is None:
        return work()
    if not here.with_rank_0:
        if here.local_rank == 0:
            click.echo(
                f"rank {here.rank}: rank 0 converts, on another machine; nothing is done here, and "
                "the exit code of rank 0's machine counts",
                err=True,
            )
        return 0
    if here.rank == 0:
        return _lead(here, _address(words), work)
    return _follow(here, _address(words))


def _address(words: Sequence[str]) -> str:
    """Return the name of the socket: the same in all ranks of one run of one command."""
    import hashlib

    run = [os.environ.get(name, "") for name in _RUN]
    identity = "\0".join([str(os.getuid()), str(Path.cwd()), *run, *words])
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    return f"\0ckptx-{digest[:32]}"


def _lead(here: RankPlace, address: str, work: Callable[[], int]) -> int:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            line.bind(address)
        except OSError:
            return _failed(0, "the same command is being run by another rank 0; wait for it")
        line.listen(max(here.local_world, 16))  # they queue here while rank 0 works
        # From now on: all are started at once, so after long work nobody is waited for.
        deadline = time.monotonic() + PATIENCE
        code = 1
        try:
            code = work()
        finally:
            _send_code(line, here.local_world - 1, code, deadline)
    return code


def _send_code(line: socket.socket, count: int, code: int, deadline: float) -> None:
    """Send the exit code to ``count`` ranks; those that never come are waited for to a deadline.

    All get it at once: torchrun ends the other processes as soon as one has failed. A warning says
    what to do where ranks do not exist, since the variables are an old job's.
    """
    warns_at = time.monotonic() + _SILENCE
    with contextlib.ExitStack() as stack:
        waiting: list[socket.socket] = []
        while len(waiting) < count:
            now = time.monotonic()
            if warns_at <= now < deadline:
                missing = f"{count - len(waiting)} of {count} other ranks"
                click.echo(
                    f"rank 0 is done, and waits {deadline - now:.0f} s for {missing} to come; if "
                    "there are none, unset RANK",
                    err=True,
                )
                warns_at = deadline
            line.settimeout(max(0.0, min(warns_at, deadline) - now))
            try:
                other = stack.enter_context(line.accept()[0])
            except (TimeoutError, BlockingIOError):  # nobody is in the queue
                if now >= deadline:
                    break
            else:
                waiting += [other] * _is_ours(other)
        for other in waiting:
            with contextlib.suppress(OSError):  # it is gone
                other.sendall(str(code).encode())


def _follow(here: RankPlace, address: str) -> int:
    import socket

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            if not _connected(line, address):
                return _failed(
                    here.rank,
                    f"rank 0 did not start this command within {PATIENCE:.0f} s; if there is none, "
                    "unset RANK and run it alone",
                )
            try:
                code = line.recv(16)
            except ConnectionError:
                code = b""
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not code.isdigit():
        return _failed(here.rank, "rank 0 died before it had finished; see its messages")
    return int(code)


def _connected(line: socket.socket, address: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            line.connect(address)
        except ConnectionRefusedError:
            time.sleep(_POLL)
        else:
            return _is_ours(line)
    return False


def _is_ours(line: socket.socket) -> bool:
    """Return whether the process at the other end is this user's: any user may take the name."""
    import socket

    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.getuid())


def _failed(rank: int, message: str) -> int:
    click.echo(f"error: rank {rank}: {message}", err=True)
    return 1
