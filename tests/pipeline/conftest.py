"""A third-party distribution with one loader and one saver that misbehave on request."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ckptx.conversion.request import ConversionRequest
from ckptx.registry import registry

PLUGIN = '''
import os, signal, sys, time
from pathlib import Path
from ckptx.tensors import lazy
from ckptx.writing import writer
from ckptx.errors import FormatError
from ckptx.protocol.hookspecs import hookimpl
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, End, SourceTensor, Tensors
import click

OPTIONS = [click.Option([f"--{name}"]) for name in ("loader-fault", "saver-fault")]


class Fault(FormatError):
    """A class that the parent does not know."""


def fail(fault, source):
    (source.parent / f"{fault}.pid").write_text(str(os.getpid()))
    match fault.partition(" ")[0]:
        case "ours":
            raise Fault("data.bin: broken by request")
        case "raise":
            raise ValueError("broken by request")
        case "exit":
            os._exit(int(fault[-1]))
        case "sysexit":
            sys.exit(int(fault[-1]))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            time.sleep(600)


class Loader:
    name = "fake"
    capabilities = {"formats": ["fake"]}

    def options(self):
        return OPTIONS[:1]

    def detect(self, source):
        return (source / "data.bin").exists()

    def load(self, source, options, context):
        fault = options.get("loader_fault") or ""
        print("a plugin that prints")
        if fault.endswith("at start"):
            fail(fault.removesuffix(" at start"), source)
        tensors = {f"t{i}": lazy.stored(0, 8 * i, "float32", (2,)) for i in range(100)}
        sources = tuple(SourceTensor(n, t) for n, t in tensors.items())
        yield Begin("fake", "fake", {}, (str(source / "data.bin"),), sources, root=str(source))
        if fault == "lambda":
            yield Tensors("passthrough", {"f": lambda: 0})
        if fault == "endless":
            (source.parent / "endless.pid").write_text(str(os.getpid()))
        while fault == "endless":
            yield Tensors("padding", {})
        for name, tensor in tensors.items():
            yield Tensors("passthrough", {name: tensor})
        if fault == "no end":
            return
        if fault:
            fail(fault, source)
        yield End()
        if fault == "after end":
            yield End()


class Saver:
    name = "fake"
    capabilities = {"formats": ["fake"]}

    def options(self):
        return OPTIONS[1:]

    def plan(self, messages, options, context):
        fault = options.get("saver_fault") or ""
        source = context.target
        begin = next(messages)
        if fault.endswith("at start"):
            fail(fault.removesuffix(" at start"), source)
        if fault == "lazy":
            return SavePlan([])
        if fault.endswith("when full"):
            time.sleep(0.5)
            fail(fault.removesuffix(" when full"), source)
        tensors = {}
        for message in messages:
            tensors.update(getattr(message, "tensors", {}))
        if fault.endswith("while writing"):
            fault = fault.removesuffix(" while writing")
            def execute(plan, files, directory, *rest):
                (directory / "out.bin").write_bytes(b"half")
                fail(fault, source)
            writer.execute = execute
        elif fault:
            fail(fault, source)
        regions = [Region(8 * i, 8, t, n) for i, (n, t) in enumerate(tensors.items())]
        return SavePlan([FilePlan("out.bin", 8 * len(regions), regions)])


@hookimpl
def register_loaders(register):
    register(Loader())


@hookimpl
def register_savers(register):
    register(Saver())
'''


class Scene:
    """A source, a target that must stay absent, and the plugin."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        self.target = root / "target"
        self.site = root / "site"
        self.processes: list[subprocess.Popen[str]] = []
        self.source.mkdir()
        (self.source / "data.bin").write_bytes(bytes(range(200)) * 4)
        info = self.site / "fake_plugins-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugins\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[ckptx]\nloader_fake = fake_plugins\nsaver_fake = fake_plugins\n"
        )
        (self.site / "fake_plugins.py").write_text(textwrap.dedent(PLUGIN))

    def job(
        self, loader_fault: str = "", saver_fault: str = "", **options: object
    ) -> ConversionRequest:
        return ConversionRequest(
            loader="fake",
            saver="fake",
            source=self.source,
            target=self.target,
            loader_options={"loader_fault": loader_fault},
            saver_options={"saver_fault": saver_fault},
            **options,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a conversion in a session of its own, as a terminal would."""
        code = "from ckptx.cli.main import main; main()"
        command = [sys.executable, "-c", code, "convert", str(self.source), str(self.target)]
        process = subprocess.Popen(
            [*command, "--to", "fake", *arguments],
            env={**os.environ, "PYTHONPATH": f"{self.site}:{Path(registry.__file__).parents[2]}"},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End what a failed test has left running."""
        for process in self.processes:
            with process:
                process.kill()

    def pid(self, fault: str) -> int:
        """Wait until a child is at its fault; return its process."""
        path = self.root / f"{fault}.pid"
        found = ""

        def written() -> bool:
            nonlocal found
            found = path.read_text() if path.exists() else ""
            return found.isdigit()

        wait_for(written)
        return int(found)

    def assert_clean(self) -> None:
        """Check that nothing is left at the target."""
        left = {path.name for path in self.root.iterdir() if path.suffix != ".pid"}
        assert left == {"source", "site"}


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; one that waits for its parent to notice has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and not is_gone(int(entry.name)):
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    found.append(int(entry.name))
    return found


@pytest.fixture
def scene(tmp_path, monkeypatch):
    made = Scene(tmp_path)
    monkeypatch.syspath_prepend(str(made.site))
    for cached in (registry.entries, registry._registered, registry._hooks):
        cached.cache_clear()
    yield made
    made.close()
    sys.modules.pop("fake_plugins", None)
    for cached in (registry.entries, registry._registered, registry._hooks):
        cached.cache_clear()
