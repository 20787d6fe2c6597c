"""Run ckptx with releases of the frameworks, one environment at a time; `make versions`.

    python -m tests.versions.matrix [FRAMEWORK[==VERSION] ...]      all of RELEASES unless named

A release lies in a directory of its own that goes before what is installed, and is deleted after
its cells. What was found goes into ``tests/versions.json``, from which ``docs/versions.md`` is
refreshed: the largest difference of two models' logits, ``equal`` for bits, else the error.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

FOUND = Path(__file__).parents[1] / "versions.json"
ROOT = Path(__file__).parents[2]
RELEASES = {
    "megatron-core": (
        *("0.9.0", "0.10.0", "0.11.0", "0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1"),
        *("0.17.1", "0.18.2", "0.19.2"),
    ),
    "deepspeed": ("0.12.6", "0.14.5", "0.16.9", "0.19.8"),
    "transformers": ("4.45.2", "4.57.6", "5.24.0"),
}
EXTRA = ("einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo")
"""What DeepSpeed imports, besides torch and what is there anyway."""
Cell = Callable[[Path], str]


def cells(framework: str, version: str, home: Path) -> Iterator[tuple[str, Cell]]:
    """Yield what is tried with a release that lies in ``home``, by name."""
    if framework == "megatron-core":
        for family in ("llama", "mixtral"):
            for form in ("torch_dist", "torch"):
                yield f"loads {family} {form}", partial(loads, version, family, form)
                yield f"saves {family} {form}", partial(saves, version, family, form)
    elif framework == "deepspeed":
        for case in ("zero0_fp32", "zero1_bf16_frozen", "zero2_bf16_groups", "zero3_bf16"):
            yield f"saves {case}", partial(deepspeed_saves, home, case)
    else:
        for family in ("llama", "qwen2", "mixtral"):
            yield f"loads {family}", partial(transformers_pair, family, None, home)
            yield f"saves {family}", partial(transformers_pair, family, home, None)


def _megatron(family: str, directory: Path) -> tuple[Any, Any]:
    from tests.interop import conversion, experts
    from tests.oracles.mcore import Layout

    write, overrides = {**conversion.FAMILIES, **experts.FAMILIES}[family]
    config = write(directory / "hf", **overrides)
    layout = Layout(tp=2, pp=2) if family == "llama" else Layout(pp=2, ep=2)
    return conversion.Source(family, directory / "hf", config), layout


def loads(version: str, family: str, form: str, directory: Path) -> str:
    """Megatron loads what ckptx writes for it, at its default strictness."""
    from tests.interop.conversion import convert, difference, sizes
    from tests.oracles import mcore, mcore_versions

    source, layout = _megatron(family, directory)
    old = mcore_versions.number(version) < (0, 15)
    options = {"target_writer": "megatron-lm-0.14" if old else None, "ckpt_format": form}
    if layout.ep > 1:
        options["target_expert_parallel_size"] = layout.ep
    convert(source.directory, directory / "core", "core", **options, **sizes(layout))
    model = source.megatron("te", layout)
    place, tokens = directory / "core", source.tokens
    checked = mcore_versions.number(version) >= (0, 14)
    found = mcore.read(
        *(model, layout, place, tokens), format=form, version=version, weights_only=checked
    )
    return f"{difference(found[..., : source.config.vocab_size], source.logits):.1e}"


def saves(version: str, family: str, form: str, directory: Path) -> str:
    """Read what Megatron saves; the logits are its own."""
    from tests.interop.conversion import convert, difference, strict_logits
    from tests.oracles import mcore, mcore_versions

    source, layout = _megatron(family, directory)
    expected = mcore.write(
        *(source.megatron("te", layout), layout, directory / "core", source.tokens),
        format=form,
        args={"vocab_size": source.config.vocab_size},
        args_names="0.16" if mcore_versions.number(version) >= (0, 16) else "0.15",
        version=version,
    )
    convert(directory / "core", directory / "back", "hf")
    found = strict_logits(directory / "back", source.tokens)
    return f"{difference(found, expected[..., : source.config.vocab_size]):.1e}"


def deepspeed_saves(home: Path, case: str, directory: Path) -> str:
    """Read what DeepSpeed saves; what its ranks gathered is the truth."""
    from safetensors.torch import load_file

    from tests.formats.test_deepspeed import LOADER, assert_state, loaded_by_name, with_alias

    _run(home, "tests/golden/deepspeed/make.py", str(directory), case)
    # Frozen weights have no master: releases gather them as the module has them, or widened.
    expected = {n: t.float() for n, t in load_file(directory / f"{case}.safetensors").items()}
    assert_state(loaded_by_name(LOADER, directory / case), with_alias(expected, case))
    return "equal"


def transformers_pair(
    family: str, writer: Path | None, reader: Path | None, directory: Path
) -> str:
    """One release saves, ckptx converts to Megatron and back, the other loads."""
    from tests.interop.conversion import convert

    script = "tests/versions/transformers_side.py"
    _run(writer, script, "write", family, str(directory / "hf"), str(directory / "expected.pt"))
    convert(directory / "hf", directory / "core", "core")
    convert(directory / "core", directory / "back", "hf")
    _run(reader, script, "read", family, str(directory / "back"), str(directory / "found.pt"))
    expected, found = (torch.load(directory / f"{name}.pt") for name in ("expected", "found"))
    return f"{float((expected - found).abs().max()):.1e}"


def _run(home: Path | None, script: str, *arguments: str) -> None:
    path = os.pathsep.join(map(str, filter(None, (home, ROOT))))
    ran = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().rpartition("\n")[2])


def installed(framework: str, version: str, home: Path) -> None:
    """Put a release into ``home``; of megatron-core below its version, as the oracle looks."""
    pip = [sys.executable, "-m", "pip"]
    if not _ran([*pip, "--version"]):
        pip = ["pip"]  # an environment without
    quiet = ["--quiet", "--disable-pip-version-check"]
    if framework != "megatron-core":
        needs = [] if framework == "transformers" else ["--no-deps", "--no-build-isolation"]
        extra = EXTRA if framework == "deepspeed" else ()
        target = ["--target", str(home), f"{framework}=={version}", *extra]
        subprocess.run(
            [*pip, "install", *quiet, *needs, *target],
            check=True,
            env={**os.environ, "DS_BUILD_OPS": "0"},
        )
        return
    newer = tuple(map(int, version.split(".")[:2])) >= (0, 17)
    wheels = [*pip, "download", *quiet, "--no-deps", "--only-binary=:all:", "-d", str(home)]
    python = ["--python-version", "3.12" if newer else "3.11"]
    subprocess.run([*wheels, *python, f"{framework}=={version}"], check=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, home / version], check=True)


def _ran(command: list[str]) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode


def tried(framework: str, version: str) -> dict[str, str]:
    """Return what every cell of a release has found."""
    from tests.oracles import mcore

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="release-") as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        try:
            installed(framework, version, home)
        except (subprocess.CalledProcessError, ValueError) as error:
            return {"installs": f"fails: {str(error)[:120]}"}
        os.environ["CKPTX_MEGATRON_CORE"] = str(home)
        for number, (name, cell) in enumerate(cells(framework, version, home)):
            place = Path(scratch) / str(number)
            place.mkdir()
            try:
                found[name] = cell(place)
            except Exception as error:
                traceback.print_exc()
                found[name] = f"fails: {_line(error)}"
            sys.stderr.write(f"{framework} {version} {name}: {found[name]}\n")
        mcore.stop()
    return found


def _line(error: Exception) -> str:
    """Return the line that says what is wrong, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["?"]
    said = next((line for line in reversed(lines) if re.match(r"\w+(Error|Exception)\b", line)), "")
    return re.sub(r" ?\(?/tmp/\S*", "", said or lines[-1])[:120]


def main(wanted: list[str]) -> None:
    """Try what is wanted and write down what was found, release by release."""
    for framework, versions in RELEASES.items():
        for version in versions:
            if not wanted or {framework, f"{framework}=={version}"} & {*wanted}:
                known = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
                known.setdefault(framework, {})[version] = tried(framework, version)
                FOUND.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
