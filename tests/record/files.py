"""Files and reports of every conversion."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .conversions import Case, cases
from .program import Done, Place, place, run, run_apart
from .sources import all_sources, golden

PROCESSES = 2
SHOWN = ("kit/llama > ", "merge-", "lora-", "adapter ", "zero2-", "modify ", "refused ", "made/")
"""Beginnings of the names of cases whose report is held as text, not as a hash."""
APART = (
    *("kit/llama > dist-tp2-pp2", "kit/llama > torch-tp2-pp2-vpp2", "kit/llama > legacy-tp2-pp2"),
    *("kit/meta-llama > meta-2", "kit/llama > dcp-titan", "kit/llama > hf-bin", "kit/llama > pt"),
    *("kit/llama > torch-tp2 > hf", "kit/llama > fp32", "kit/qwen3_moe > ep4-etp2"),
    *("family/deepseek-v3-mtp > torch", "family/bert > legacy", "family/quantised > hf"),
    *("family/llava-clip > torch", "merge-two > hf", "lora-inside > peft"),
    *("made/megatron/verl-torch > hf", "made/trained/rlinf-dcp > hf", "zero2-module > hf"),
    *("golden/zero3_bf16 > hf", "golden/universal2 > core", "refused tp3", "refused unknown"),
    *("llama_mistral-meta > core", "modify kit/llama", "modify kit/llama > dcp-container"),
)
"""Cases that are run as real commands, too."""


def short(data: bytes | str) -> str:
    """Return 64 bits of a sha256."""
    raw = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(raw).hexdigest()[:16]


@cache
def all_cases() -> dict[str, Case]:
    """Return every case by name."""
    return cases(golden())


class Workshop:
    """Makes sources and runs cases in a place, each once."""

    def __init__(self, where: Place) -> None:
        self.where = where
        self.done: dict[str, Done] = {}

    def path(self, name: str) -> Path:
        """Return where a source or the target of a case is, made or not."""
        ending = ".pt" if name in all_cases() and self._is_file(all_cases()[name]) else ""
        apart = name.replace("kit/llama-fp32", "kit/llama.fp32")  # not "kit/llama > fp32"
        return self.where.root / (re.sub(r"[^\w.]+", "_", apart) + ending)

    def _is_file(self, case: Case) -> bool:
        if case.command == "modify":
            return case.source in all_cases() and self._is_file(all_cases()[case.source])
        return case.saver == "pytorch"

    def have(self, name: str) -> Path:
        """Return where a source or the target of a case is; make it if it is not there."""
        path = self.path(name)
        if name in all_cases():
            self.run(name)
        elif name not in self.done:
            all_sources()[name](path)
            self.done[name] = Done(0, "", "")
        return path

    def words(self, case: Case, target: Path) -> list[str]:
        """Return the command line of a case."""
        for name in case.needs():
            self.have(name)
        words = [
            str(self.path(word[1:-1])) if word.startswith("{") else word
            for word in _split(case.options)
        ]
        to = ["--to", case.saver] if case.saver else []
        return [case.command, str(self.path(case.source)), str(target), *to, *words]

    def run(self, name: str) -> Done:
        """Run a case in this process."""
        if name not in self.done:
            case = all_cases()[name]
            self.done[name] = run(*self.words(case, self.path(name)))
        return self.done[name]

    def entry(self, name: str) -> str:
        """Return what a case has said and written: a line for each file, with its hash."""
        done = self.run(name)
        text = self.where.told(done.text())
        said = text if name.startswith(SHOWN) or done.code else f"{short(text)}  (the report)\n"
        return said + listed(self.path(name))


def _split(options: str) -> list[str]:
    """Split options at blanks that are not within braces."""
    return re.findall(r"\{[^}]*\}|\S+", options)


def listed(path: Path) -> str:
    """Return the hash of a file, or of all below a directory, a line each."""
    if path.is_file():
        beside = sorted(path.parent.glob(f"{path.name}*"))
        pairs = [(f"FILE{p.name.removeprefix(path.name)}", p) for p in beside]
    else:
        pairs = [(str(p.relative_to(path)), p) for p in sorted(path.rglob("*")) if p.is_file()]
    return "".join(f"{short(_content(p))}  {label}\n" for label, p in pairs)


def _content(path: Path) -> bytes:
    """Return what a file holds; of a manifest without the versions."""
    data = path.read_bytes()
    if path.name.endswith("ckptx-manifest.json"):
        said = json.loads(data)
        said["written_by"] = sorted(said["written_by"])
        return json.dumps(said).encode() + str(data.count(b"\n")).encode()
    return data


def _root(name: str) -> str:
    while name in all_cases():
        name = all_cases()[name].source
    return name


def _some(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    with place() as where:
        workshop = Workshop(where)
        for name in names:
            found[name] = workshop.entry(name)
        shutil.rmtree(where.root)
    return found


def entries(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return the entries of all cases of which one is wanted."""
    chosen = list(filter(is_wanted, all_cases()))
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(_root(name), []).append(name)
    shares: list[list[str]] = [[] for _ in range(PROCESSES)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    found: dict[str, str] = {}
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for part in pool.map(_some, [share for share in shares if share], chunksize=1):
            found |= part
    return found


def entries_apart(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return what the real command says and writes, for a few cases."""
    found: dict[str, str] = {}
    with place() as where:
        workshop = Workshop(where)
        for name in filter(is_wanted, APART):
            target = workshop.path(name)
            done = run_apart(*workshop.words(all_cases()[name], target))
            found[name] = where.told(done.text()) + listed(target)
            workshop.done[name] = done
    return found
