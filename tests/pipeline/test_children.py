"""The saver's process, run in this one: what happens between its plan and its copy."""

from __future__ import annotations

import os
import pickle
import queue
import threading
from multiprocessing import Pipe

import pytest

from ckptx.conversion.request import ConversionRequest
from ckptx.conversion.worker import run_saver
from ckptx.errors import ConversionError
from ckptx.processes.supervision import Channel
from ckptx.registry import registry


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
