"""Packages with families that are found on the Python path, as installed ones are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def declare(site: Path, distribution: str, point: str) -> Path:
    """Make a folder a place where a distribution is installed that declares a schema."""
    info = site / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[ckptx]\n{point}\n")
    return site


def run(*arguments: str | Path, path: tuple[Path, ...] = (), cwd: Path = ROOT):
    """Run Python with folders on its path; what it says is in the failure."""
    env: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(place) for place in path),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def granite(tmp_path_factory):
    """The folders that make the example package installed."""
    example = ROOT / "examples" / "ckptx-family"
    site = tmp_path_factory.mktemp("granite")
    declare(site, "ckptx-granite", "schema_granite = ckptx_granite:FAMILY")
    return (example, site)
