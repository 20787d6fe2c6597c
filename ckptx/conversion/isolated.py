"""A conversion in a process of its own: for sources of strangers, and for Megatron-style modules.

    the caller  --- call, sys.path --->  python -m ckptx.conversion.isolated
                <-- log, result or failure --

The process runs this module, so that the ``__main__`` of the caller, a script without a guard or a
notebook, is not imported again. It supervises a loader and a saver like the command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from ckptx.conversion.keywords import Call
from ckptx.conversion.report import Plan, Report
from ckptx.errors import ConversionError
from ckptx.processes import supervision
from ckptx.processes.supervision import Failure


def run(call: Call) -> Report | Plan:
    """Do what a call asks for, in another process.

    Raises:
        CkptxError: the first cause of a failure.
        KeyboardInterrupt: the process was ended, and has cleaned up.
    """
    ours, theirs = Pipe()
    descriptor = theirs.fileno()
    command, env = supervision.module_command(__name__, str(descriptor), str(os.getpid()))
    with ours:
        with theirs:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[descriptor], env=env
            )
        try:
            ours.send((call, sys.path, logging.getLogger().getEffectiveLevel()))
            outcome = _outcome(ours)
        except (EOFError, OSError) as error:
            how = supervision.manner_of_death(process.wait())
            raise ConversionError(f"the isolated process {how}; nothing was written") from error
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
    if isinstance(outcome, Failure):  # after which the process cleans up and ends by itself
        raise outcome.exception()
    return outcome


def _outcome(line: Connection) -> Report | Plan | Failure:
    while True:
        tag, content = line.recv()
        match tag:
            case "log":
                logging.getLogger(content.name).handle(content)
            case "failed" | "done":
                outcome: Report | Plan | Failure = content
                return outcome


def main(descriptor: int, parent: int) -> None:
    """Run in the isolated process; its only results are what it sends to its parent."""
    from ckptx.conversion import engine, megatron_modules, supervisor

    connection = Connection(descriptor)
    call, sys.path[:], level = connection.recv()
    line = supervision.Channel(connection)
    supervision.settle_child(parent, line, level)
    megatron_modules.install()
    try:
        request = call.request()
        plan = call.action == "plan"
        result = engine.forecast(request) if plan else supervisor.convert(request)
        line.send("done", result)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the parent is gone
            line.send("failed", Failure.of(error, "the conversion"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
