"""The saver's process, run in this one: what happens between its plan and its copy."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest

from ckptx.conversion.request import ConversionRequest
from ckptx.conversion.worker import run_saver
from ckptx.errors import ConversionError
from ckptx.processes.supervision import Channel
from ckptx.registry import registry

ROOT = Path(registry.__file__).resolve().parents[2]


def test_a_source_that_changes_once_it_is_planned_is_noticed(tmp_path, write_llama):
    source = write_llama(tmp_path / "llama")
    staging = tmp_path / "out.ckptx-partial" / "new"
    staging.mkdir(parents=True)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for message in registry.loader("hf").load(source, {}):
        messages.put(pickle.dumps(message))
    ours, theirs = Pipe()

    def parent() -> None:
        while ours.recv()[0] != "planned":
            pass
        os.utime(source / "model.safetensors", ns=(0, 0))
        ours.send((str(staging), False))

    watching = threading.Thread(target=parent)
    watching.start()
    job = ConversionRequest(loader="hf", saver="hf", source=source, target=tmp_path / "out")
    with pytest.raises(ConversionError, match="changed while it was converted"):
        run_saver(job, messages, Channel(theirs), "")
    watching.join()
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "hf"], ""),
        (["--to", "hf", "--max-queue-size", "3"], ""),
        (["--to", "hff"], "error: unknown saver 'hff' (did you mean 'hf'?)"),
        (["--to", "hf", "--unknown"], "error: No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_processes_that_start_early_are_used_or_gone(words, said, tmp_path, write_llama):
    """Whatever is wrong with a command, the processes that were started for it say nothing."""
    write_llama(tmp_path / "llama")
    done = subprocess.run(
        [sys.executable, "-m", "ckptx", "convert", "llama", "out", "-q", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
    assert (tmp_path / "out" / "model.safetensors").exists() == (not said)
    assert {path.name for path in tmp_path.iterdir()} <= {"llama", "out"}
