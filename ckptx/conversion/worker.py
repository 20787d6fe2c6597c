"""The two processes of a conversion, seen from inside.

The loader's process turns messages into bytes and puts them on the queue; the saver's takes them
off, plans, proves, asks the parent for a place to write, and writes. Pickling is done here, not by
the queue: its thread would only print what it cannot pickle, and the other side would wait.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeAlias

from ckptx.containers.pickle_values import collector_paused
from ckptx.conversion.megatron_modules import ModuleSaver
from ckptx.conversion.report import Facts
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import PluginError, listing
from ckptx.processes.supervision import Channel, Failure, settle_child
from ckptx.protocol.contracts import WEIGHTS, Wants
from ckptx.protocol.messages import Begin, End, Message
from ckptx.registry import registry
from ckptx.registry.open import checkpoint_messages, title
from ckptx.storage.spool import Spool
from ckptx.writing.atomic import sync_tree, write_durable
from ckptx.writing.journal import NAME, Identity, Journal, identify
from ckptx.writing.publish import check_files, manifest_path, outline

Bytes: TypeAlias = "Queue[bytes]"
Outcome: TypeAlias = tuple[Facts, str, int]
"""What a saver has done: the facts, the digest, and the bytes that an earlier run had written."""


def main(
    role: str,
    job: ConversionRequest,
    queue: Bytes,
    connection: Connection,
    parent: int,
    level: int,
    spool: str,
) -> None:
    """Run one child process; its only results are what it sends to its parent."""
    line = Channel(connection)
    settle_child(parent, line, level)
    run: Callable[[ConversionRequest, Bytes, Channel, str], Any] = (
        run_loader if role == "loader" else run_saver
    )
    try:
        result = run(job, queue, line, spool)
        line.send("done", result)
    # Whatever a plugin raises, exit() included, is for the parent to report.
    except BaseException as error:
        queue.cancel_join_thread()
        line.send("failed", Failure.of(error, f"{role} {getattr(job, role)!r}"))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads and exit handlers of a failed plugin have nothing left to add


def messages_of(job: ConversionRequest, spool: Spool | None) -> Iterator[Message]:
    """Return the messages of the job's loader."""
    return checkpoint_messages(
        job.source,
        job.loader,
        options=job.options(job.loader_options),
        wants=_wants(job.saver),
        spool=spool,
        megatron_path=job.megatron_path,
    )


def _wants(saver: str) -> Wants:
    """Return what a saver wants to be given; a Megatron-style module is not imported for it."""
    if registry.canonical(saver) not in registry.names("saver"):
        return WEIGHTS
    wants: Wants = getattr(registry.saver(saver), "wants", WEIGHTS)
    return wants


def run_loader(job: ConversionRequest, queue: Bytes, line: Channel, spool_path: str) -> None:
    """Send the messages of the loader."""
    spool = Spool(spool_path)
    for message in changed(messages_of(job, spool), job):
        try:
            content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
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


def run_saver(job: ConversionRequest, queue: Bytes, line: Channel, spool_path: str) -> Outcome:
    """Plan, prove and write what the loader sends."""
    saver = registry.saver(job.saver, job.megatron_path)
    stream = CheckedMessages(_received(queue))
    if isinstance(saver, ModuleSaver):
        return _write_directly(saver, job, stream, line), "", 0
    from ckptx.conversion import manifest, proof
    from ckptx.writing import writer

    with collector_paused():
        plan = saver.plan(recast(stream, job), job.options(job.saver_options))
        begin, end = stream.finish(job.saver)
        check_files(plan, job.target, begin.files)
        states = writer.states(begin.files)
        proved = proof.prove(plan, begin, end)
    # What lies in the spool is gone with this run, and may come in another order in the next.
    lasting = job.resume and spool_path not in begin.files
    identity = identify(plan, begin.files, states, versions(job), job.digest) if lasting else None
    place, published = line.ask("planned", (outline(plan), identity))
    facts = Facts.of(begin, end, plan, proved)
    if published:  # by a run that was killed before it could say so
        digest = json.loads((Path(place) / manifest_path(plan)).read_bytes())["digest"]
        return facts, digest, sum(file.size for file in plan.files)
    staging = Path(place)
    with writer.writing(staging, plan), _journal(staging, identity, job) as journal:
        inexact = {name for names in proved.inexact.values() for name in names}
        written = writer.execute(
            plan, begin.files, staging, write_options(job), line.advance, journal, states, inexact
        )
        line.flush()
        content, digest = manifest.build(
            plan, begin, written.digests, versions(job), staging, spool_path, job.digest
        )
        write_durable(staging / manifest_path(plan), content)
    facts = replace(facts, notes=(*facts.notes, *_overflow(written.infinite)))
    return facts, digest, written.resumed


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
    staging: Path, identity: Identity | None, job: ConversionRequest
) -> AbstractContextManager[Journal | None]:
    if identity is None:
        return nullcontext()
    return Journal(staging.with_name(NAME), identity, job.journal_every)


def _write_directly(
    saver: ModuleSaver, job: ConversionRequest, stream: CheckedMessages, line: Channel
) -> Facts:
    staging = Path(line.ask("planned", (saver.outline(job), None))[0])
    options = job.options(job.saver_options, staging=staging)
    facts = saver.write_directly(recast(stream, job), options, line.advance)
    stream.finish(job.saver)
    line.flush()
    sync_tree(staging)
    return facts


def changed(messages: Iterable[Message], job: ConversionRequest) -> Iterator[Message]:
    """Return the messages with the edits of the job made."""
    if job.edits is None:
        return iter(messages)
    from ckptx.conversion.edits import edited

    return edited(iter(messages), job.edits, job.loader)


def recast(messages: Iterable[Message], job: ConversionRequest) -> Iterator[Message]:
    """Return the messages in the dtype that the job asks for."""
    if job.dtype is None:
        return iter(messages)
    from ckptx.conversion.casting import cast_messages

    return cast_messages(messages, job.dtype)


def write_options(job: ConversionRequest) -> Any:
    """Return the writer's options of a job."""
    from ckptx.writing.writer import WriteOptions

    return WriteOptions(job.threads, job.max_memory, job.digest, job.check_replicas)


def versions(job: ConversionRequest) -> dict[str, str]:
    """Return the versions of everything that shapes the output."""
    from ckptx import __version__

    chosen = registry.versions(("loader", job.loader), ("saver", job.saver))
    return {**chosen, "ckptx": __version__}


class CheckedMessages:
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


def _received(queue: Bytes) -> Iterator[Message]:
    while True:
        message: Message = pickle.loads(queue.get())
        yield message
        if isinstance(message, End):
            return
