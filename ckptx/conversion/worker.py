"""The two processes of a conversion, seen from inside.

The loader's process turns messages into bytes and puts them on the queue; the saver's takes them
off, plans, proves, asks the parent for a place to write, and writes. Pickling is done here, not by
the queue: its thread would only print what it cannot pickle, and the other side would wait.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING, TypeAlias

from ckptx.conversion import engine, megatron_modules
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, PluginError
from ckptx.processes.supervision import Channel, Failure, settle_child
from ckptx.protocol.messages import End, Message
from ckptx.registry.open import title
from ckptx.storage.spool import Spool

if TYPE_CHECKING:
    from ckptx.protocol.contracts import SavePlan
    from ckptx.writing.journal import Identity


class PipeQueue:
    """A pipe as a queue of bytes, from one process to one; whoever puts waits while it is full."""

    def __init__(self, reader: Connection, writer: Connection) -> None:
        self._reader, self._writer = reader, writer
        self.put, self.get = writer.send_bytes, reader.recv_bytes

    def close(self) -> None:
        """Close both ends in this process."""
        self._reader.close()
        self._writer.close()

    def join_thread(self) -> None:
        """Do nothing: what was put is on its way."""

    def cancel_join_thread(self) -> None:
        """Do nothing, likewise."""


Bytes: TypeAlias = "Queue[bytes] | PipeQueue"


def main(role: str, queue: Bytes, connection: Connection, parent: int) -> None:
    """Run one child process; its only results are what it sends to its parent.

    It receives the request, the level of the log and the path of the spool; or nothing, if the
    parent finds that there is nothing to do.
    """
    line = Channel(connection)
    settle_child(parent, line, logging.WARNING)
    try:
        job, level, spool = connection.recv()
    except EOFError:
        return
    logging.getLogger().setLevel(level)
    megatron_modules.install()
    try:
        if role == "loader":
            run_loader(job, queue, spool)
            line.send("done", None)
        else:
            line.send("done", run_saver(job, queue, line, spool))
    # Whatever a plugin raises, exit() included, is for the parent to report.
    except BaseException as error:
        queue.cancel_join_thread()
        line.send("failed", Failure.of(error, f"{role} {getattr(job, role)!r}"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads and exit handlers of a failed plugin have nothing left to add


def run_loader(job: ConversionRequest, queue: Bytes, spool_path: str) -> None:
    """Send the messages of the loader."""
    spool = Spool(spool_path)
    for message in engine.load(job, spool):
        try:
            content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        except CkptxError:  # what lies compressed is decoded on the way
            raise
        # pickle has no exception of its own for most of what cannot be pickled
        except Exception as error:
            raise PluginError(
                f"loader {job.loader!r} sent a message that cannot travel between processes "
                f"({title(message)}): {type(error).__name__}: {error}"
            ) from error
        queue.put(content)
    spool.close()
    queue.close()
    queue.join_thread()


def run_saver(
    job: ConversionRequest, queue: Bytes, line: Channel, spool_path: str
) -> engine.Outcome:
    """Plan, prove and write what the loader sends."""
    return engine.save(job, _received(queue), _ParentOwner(line), spool_path)


class _ParentOwner:
    """The owner of the target, in the parent process."""

    def __init__(self, line: Channel) -> None:
        self._line = line
        self.advance = line.advance
        self.flush = line.flush

    def prepare(self, plan: SavePlan, identity: Identity | None) -> tuple[str, bool]:
        """Ask the parent for a staging directory."""
        place: tuple[str, bool] = self._line.ask("planned", (plan, identity))
        return place


def _received(queue: Bytes) -> Iterator[Message]:
    while True:
        message: Message = pickle.loads(queue.get())
        yield message
        if isinstance(message, End):
            return
