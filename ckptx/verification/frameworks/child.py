"""A framework's process, seen from the parent: its job goes in as JSON, its answer comes out so."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptx.errors import ConversionError, PlanError
from ckptx.processes.interrupts import Interrupts
from ckptx.processes.supervision import GRACE, manner_of_death, module_command

_POLL = 0.1  # seconds between looks at whether a signal has come
_PACKAGES = {"transformers": "hf", "megatron.core": "megatron", "deepspeed": "deepspeed"}


def installed(package: str) -> bool:
    """Return whether a framework can be imported; an empty namespace package cannot."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, what: str) -> None:
    """Refuse to go on without a framework.

    Raises:
        PlanError: it is not installed; the message says how to install it.
    """
    if missing := [name for name in (package, "torch") if not installed(name)]:
        name = missing[0].replace(".", "-")
        raise PlanError(
            f"{what} is run by {name}, which is not installed: "
            f"pip install 'ckptx[{_PACKAGES[package]}]'"
        )


def ask(module: str, job: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """Run ``ckptx.verification.frameworks.MODULE`` in a process of its own and return its answer.

    Raises:
        ConversionError: it failed, in its own words, or died.
        Interrupted: SIGINT or SIGTERM came; the process is gone then.
    """
    with tempfile.TemporaryDirectory(prefix="ckptx-running-") as scratch, Interrupts() as stopping:
        asked, answered, log = (Path(scratch) / n for n in ("job.json", "answer.json", "log"))
        asked.write_text(json.dumps({**job, "parent": os.getpid()}))
        # Pickles are never executed, whatever a framework's own default is.
        offline = {
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0",
            "HF_HUB_OFFLINE": "1",
        }
        name = f"ckptx.verification.frameworks.{module}"
        command, env = module_command(name, str(asked), str(answered))
        with log.open("wb") as output:
            verbose = logging.getLogger().isEnabledFor(logging.INFO)
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output if not verbose else 2,
                stderr=output if not verbose else None,
                env=env | offline | environment,
            ) as process:
                try:
                    while process.poll() is None:
                        stopping.check()
                        time.sleep(_POLL)
                    stopping.check()
                finally:
                    _end(process)
        if not answered.is_file():
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            last = f": {tail[0][:300]}" if tail else ""
            raise ConversionError(
                f"{module.replace('_', ' ')}: its process {manner_of_death(process.returncode)}"
                f"{last}"
            )
        answer: dict[str, Any] = json.loads(answered.read_text())
    if "error" in answer:
        error = ConversionError(answer["error"])
        error.add_note(f"\nIn the framework's process:\n{answer['trace']}")
        raise error
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process: politely, and after a while by force."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
