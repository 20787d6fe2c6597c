"""A framework's process, seen from inside: read a job, do it, write the answer or the error."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckptx.processes.supervision import die_with

LONGEST = 700
"""Characters of a framework's message that are passed on; some list every tensor."""


class SideError(Exception):
    """An error whose message is complete: nothing is added to it."""


def described(error: BaseException, longest: int = LONGEST) -> str:
    """Return the message of an error in one line of ``longest`` characters, or a little more."""
    text = str(error) if isinstance(error, SideError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]} ... (--verbose shows all)"


def first_sentence(error: BaseException) -> str:
    """Return what an error says before it advises; frameworks advise at length."""
    return described(error, longest=300).split(". ")[0].rstrip(".")


def serve(act: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """Do the job that the command line names; the answer is a JSON object.

    It has ``error`` and ``trace`` if that failed. The process dies with its parent, which alone
    handles Ctrl-C.
    """
    asked, answered = map(Path, sys.argv[1:3])
    job = json.loads(asked.read_text())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(job["parent"])
    try:
        answer = act(job)
    except BaseException as error:  # as CheckpointException of torch is one
        answer = {"error": described(error), "trace": traceback.format_exc()}
    partial = answered.with_suffix(".partial")
    partial.write_text(json.dumps(answer))
    partial.rename(answered)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit("error" in answer)  # frameworks leave threads and exit handlers that may hang
