"""Measure conversions against ``cp``: wall time in alternated pairs, and memory over all processes.

    python benchmarks/bench.py [--work DIR] [--pairs 7] [--only NAME] [--peers PYTHON]
                               [--memory] [--plans] [--against COMMAND]

Every case is run in turn with a copy of the same source, ``cp -r`` followed by a sync of what was
copied, because a conversion is durable when it returns. Both start from a warm page cache. A case
is void where the slowest copy took more than 1.5 times the fastest: the machine was busy. Peak
memory is the proportional set size (PSS) of the command and all its children, sampled every 20 ms.

Where others do the same conversion they are run in the first pairs of it: DeepSpeed's
zero_to_fp32, torch's dcp_to_torch and accelerate's merge-weights, from the environment whose
Python ``--peers`` or CKPTX_BENCH_PEERS names. What is not installed there is left out with a line.

With ``--plans`` the largest open models, as files of holes, are planned for 8,192 ranks. With
``--against`` another installed ckptx takes the place of the copies: an older release, say. Tiny
models come first then, whose time is that of starting.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import giants
from models import build

CKPTX = Path(sys.executable).with_name("ckptx")


@dataclass(frozen=True)
class Run:
    """Wall time in seconds, peak PSS in bytes (0 where it was not sampled)."""

    wall: float
    peak: int = 0


PEER_RUNS = 3
"""Pairs in which peers are run, too: they take long."""


@dataclass(frozen=True, eq=False)
class Peer:
    """Another tool that does a conversion: a module, and its arguments with ``{target}``."""

    name: str
    module: str
    arguments: Sequence[str | Path]

    def installed(self, python: str) -> bool:
        """Return whether an environment has it; say so where not."""
        package = self.module.partition(".")[0]
        found = not subprocess.run(
            [python, "-c", f"import {package}"], capture_output=True
        ).returncode
        if not found:
            print(f"{self.name}: {python} has no {package}; left out", file=sys.stderr)
        return found

    def run(self, python: str, target: Path) -> Run:
        """Run it and sync what it has written."""
        target.mkdir()
        arguments = [str(word).replace("{target}", str(target)) for word in self.arguments]
        command = [python, "-m", self.module, *arguments]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **_CPU})
        subprocess.run(["sync", *(f for f in target.rglob("*") if f.is_file())], check=True)
        return Run(time.perf_counter() - start)


_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Case:
    """One conversion: where from, the options of ``ckptx convert``, and who else does it."""

    name: str
    source: Path
    options: Sequence[str]
    peers: Sequence[Peer] = ()


def main() -> int:
    """Run the benchmark and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for models and outputs; kept")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument(
        "--peers",
        default=os.environ.get("CKPTX_BENCH_PEERS", sys.executable),
        help="Python of the environment with deepspeed and accelerate",
    )
    parser.add_argument("--memory", action="store_true", help="only the memory cases")
    parser.add_argument("--plans", action="store_true", help="only the plans of giants")
    parser.add_argument("--against", type=Path, help="the command ckptx of another environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptx-bench-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if arguments.plans:
            plan_giants(work, arguments.only)
            return 0
        if arguments.against:
            print("| case | ckptx s | the other s | ratio, median of pairs |\n|---|---|---|---|")
            larger = () if "tiny" in arguments.only else model_cases(work)
            for case in itertools.chain(tiny_cases(work), larger):
                if arguments.only in case.name:
                    print(paired(case, work, arguments.pairs, arguments.against), flush=True)
            return 0
        print("| case | bytes | ckptx s | cp + sync s | ratio | GB/s | peak PSS MiB | others |")
        print("|---|---|---|---|---|---|---|---|")
        made = memory_cases(work) if arguments.memory else cases(work, arguments.only)
        for case in made:
            if arguments.only in case.name:
                pairs = 0 if arguments.memory else arguments.pairs
                print(measure(case, work, pairs, arguments.peers), flush=True)
    return 0


def cases(work: Path, only: str) -> Iterator[Case]:
    """Yield all cases; those of training are not made where ``only`` cannot mean them."""
    if not only or any(word in only for word in ("ZeRO", "DCP", "dcp")):
        yield from trained_cases(work)
    if not any(word in only for word in ("ZeRO", "DCP")):
        yield from model_cases(work)


def trained_cases(work: Path) -> Iterator[Case]:
    """Yield what training frameworks leave, and the way into one."""
    from trained import sharded, zero  # they need torch

    hf = build("0.44B", work / "hf-0.44B")
    to_hf = ["--to", "hf"]
    for stage in (2, 3):
        source = zero(hf, work / f"zero{stage}", stage)
        given = [source, "{target}", "--safe_serialization"]
        extract = Peer("zero_to_fp32", "deepspeed.utils.zero_to_fp32", given)
        yield Case(f"0.44B ZeRO-{stage}, 4 ranks -> hf float32", source, to_hf, [extract])
    source = sharded(hf, work / "dcp")
    formats = "torch.distributed.checkpoint.format_utils"
    peers = [
        Peer("dcp_to_torch", formats, ["dcp_to_torch", source, "{target}/model.pt"]),
        Peer(
            "accelerate merge-weights",
            "accelerate.commands.accelerate_cli",
            ["merge-weights", source, "{target}"],
        ),
    ]
    yield Case("0.44B FSDP DCP, 4 ranks -> hf", source, to_hf, peers)
    yield Case("0.44B hf -> dcp, 4 shards", hf, ["--to", "dcp", "--shards", "4"])


def tiny_cases(work: Path) -> Iterator[Case]:
    """Yield conversions that take no time but that of starting and planning."""
    hf, base = build("tiny", work / "hf-tiny"), work / "core-tiny"
    if not base.exists():
        convert(hf, base, core(2, 1, "torch_dist"))
    yield Case("tiny hf -> core torch_dist TP2", hf, core(2, 1, "torch_dist"))
    yield Case("tiny core TP2 -> hf", base, ["--to", "hf"])
    yield Case("tiny hf -> hf", hf, ["--to", "hf"])


def paired(case: Case, work: Path, pairs: int, other: Path) -> str:
    """Return a table row: medians of both commands over alternated pairs, and of their ratios."""
    target = work / "target"
    runs: dict[Path, list[float]] = {CKPTX: [], other: []}
    for pair in range(pairs + 1):
        for command in (CKPTX, other) if pair % 2 else (other, CKPTX):
            remove(target)
            run = timed([command, "convert", case.source, target, *case.options, "--quiet"])
            runs[command] += [run.wall] * bool(pair)  # the first pair warms up
    remove(target)
    mine, theirs = runs.values()
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    both = f"{statistics.median(mine):.2f} | {statistics.median(theirs):.2f}"
    return f"| {case.name} | {both} | {ratio:.2f} |"


def model_cases(work: Path) -> Iterator[Case]:
    """Yield the placements and one cast, at both sizes."""
    for size in ("0.44B", "1.26B"):
        hf = build(size, work / f"hf-{size}")
        yield Case(f"{size} hf -> core torch_dist TP2 PP2", hf, core(2, 2, "torch_dist"))
        yield Case(f"{size} hf -> core torch TP2 PP2", hf, core(2, 2, "torch"))
        base = work / f"core-{size}"
        if not base.exists():
            convert(hf, base, core(2, 2, "torch_dist"))
        yield Case(f"{size} core TP2 PP2 -> core TP4", base, core(4, 1, "torch_dist"))
        yield Case(f"{size} core TP2 PP2 -> hf", base, ["--to", "hf"])
        yield Case(f"{size} hf -> hf float32", hf, ["--to", "hf", "--dtype", "float32"])
    hf, experts = build("8x0.12B", work / "hf-experts"), work / "core-experts"
    parallel = [*core(1, 1, "torch_dist"), "--ep", "4"]
    yield Case("8x0.12B hf -> core torch_dist EP4", hf, parallel)
    if not experts.exists():
        convert(hf, experts, parallel)
    yield Case("8x0.12B core EP4 -> hf", experts, ["--to", "hf"])
    legacy = work / "legacy"
    if not legacy.exists():
        convert(build("1.26B", work / "hf-1.26B"), legacy, ["--to", "legacy", "--tp", "2"])
    yield Case("1.26B legacy TP2 -> core torch_dist TP2 PP2", legacy, core(2, 2, "torch_dist"))


def plan_giants(work: Path, only: str) -> None:
    """Plan the giants and print a table in Markdown."""
    print("| plan | source tensors | wall s | peak PSS MiB |")
    print("|---|---|---|---|")
    options = [*core(8, 16, ""), "--ep", "64", "--decoder-first-pipeline-num-layers", "3"]
    options += ["--decoder-last-pipeline-num-layers", "2", "--ckpt-format"]
    for model, config in (("DeepSeek-V3", giants.DEEPSEEK_V3), ("Kimi-K2", giants.KIMI_K2)):
        source = giants.write(config, work / model)
        count = sum(1 for _ in giants.tensors(config))
        for form in ("torch_dist", "torch"):
            name = f"{model} hf -> core {form} TP8 PP16 EP64"
            if only in name:
                command = [CKPTX, "plan", source, work / "target", *options, form, "--quiet"]
                runs = [timed(command) for _ in range(3)]
                peak = sampled(command).peak
                print(
                    f"| {name} | {count:,} | {median(runs):.1f} | {peak / 2**20:.0f} |", flush=True
                )


def memory_cases(work: Path) -> Iterator[Case]:
    """Yield one case of 8B parameters whose source is a file of holes."""
    hf = build("8B", work / "hf-8B", sparse=True)
    yield Case("8B (sparse) hf -> core torch_dist TP2 PP2", hf, core(2, 2, "torch_dist"))
    yield Case("8B (sparse) hf -> core torch TP8", hf, core(8, 1, "torch"))
    small = giants.write({**giants.DEEPSEEK_V3, **giants.SMALL}, work / "DeepSeek-V3-small")
    stages = ["--ep", "8", "--decoder-first-pipeline-num-layers", "13"]
    name = "DeepSeek-V3 scaled down (sparse) hf -> core {} TP2 PP4 EP8"
    for form in ("torch_dist", "torch"):
        yield Case(name.format(form), small, [*core(2, 4, form), *stages])


def core(tp: int, pp: int, ckpt_format: str) -> list[str]:
    """Return the options of a Megatron target; the format is left open where it is empty."""
    sizes = ["--to", "core", "--tp", str(tp), "--pp", str(pp)]
    return [*sizes, "--ckpt-format", ckpt_format] if ckpt_format else sizes


def measure(case: Case, work: Path, pairs: int, python: str) -> str:
    """Return a table row: medians over alternated pairs, and the peak of a run of its own."""
    target, copy = work / "target", work / "copy"
    ours: list[Run] = []
    copies: list[Run] = []
    others = {peer: list[Run]() for peer in case.peers if peer.installed(python)} if pairs else {}
    for pair in range(pairs + 1 if pairs else 0):
        for ckptx in (True, False) if pair % 2 else (False, True):
            remove(target, copy)
            run = convert(case.source, target, case.options) if ckptx else copied(case.source, copy)
            if pair:  # the first pair warms up
                (ours if ckptx else copies).append(run)
        for peer, runs in others.items():
            if 0 < pair <= PEER_RUNS:
                remove(target, copy)
                runs.append(peer.run(python, copy))
    remove(target, copy)
    alone = sampled([CKPTX, "convert", case.source, target, *case.options, "--quiet"])
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    remove(target, copy)
    peak = f"{alone.peak / 2**20:.0f} |"
    if not pairs:
        return f"| {case.name} | {written:,} | {alone.wall:.1f} | - | - | - | {peak} - |"
    mine, theirs = median(ours), median(copies)
    said = [
        f"{peer.name} {median(runs):.1f} s, {median(runs) / mine:.1f} times as long"
        for peer, runs in others.items()
    ]
    spread = max(run.wall for run in copies) / min(run.wall for run in copies)
    void = f" (void: cp spread {spread:.2f})" if spread > 1.5 else ""
    return (
        f"| {case.name}{void} | {written:,} | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} "
        f"| {written / mine / 1e9:.2f} | {peak} {'; '.join(said) or '-'} |"
    )


def convert(source: Path, target: Path, options: Sequence[str]) -> Run:
    """Convert without sampling, which would cost time."""
    return timed([CKPTX, "convert", source, target, *options, "--quiet"])


def timed(command: Sequence[str | Path]) -> Run:
    """Run a command; only its time is taken."""
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return Run(time.perf_counter() - start)


def copied(source: Path, target: Path) -> Run:
    """Copy with ``cp -r`` and sync every file of the copy."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *(file for file in target.rglob("*") if file.is_file())], check=True)
    return Run(time.perf_counter() - start)


def sampled(command: Sequence[str | Path]) -> Run:
    """Run a command while the memory of its whole process tree is sampled."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(pss(pid) for pid in tree(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return Run(time.perf_counter() - start, peak)


def tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes, 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def median(runs: Sequence[Run]) -> float:
    """Return the median wall time."""
    return statistics.median(run.wall for run in runs)


def remove(*paths: Path) -> None:
    """Delete outputs, and wait until their blocks are free."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()


if __name__ == "__main__":
    sys.exit(main())
