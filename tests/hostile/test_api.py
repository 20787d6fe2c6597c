"""The catalogue of hostile pickles, opened and converted by the API with little memory."""

from __future__ import annotations

import subprocess
import sys

from .conftest import ROOT

MEMORY = 2 << 30
"""Bytes of address space: numpy's libraries take a good part."""
PROGRAM = f"""
import resource, sys
from pathlib import Path

import ckptx
from tests.hostile.pickle_catalogue import ODD, REFUSED
from tests.hostile.test_pickles import archive, shapes_of

ckptx.families()
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
place = Path(sys.argv[1])
refused = 0
for name, fragment in (*REFUSED.items(), *ODD.items()):
    for number, pickled in enumerate(shapes_of(fragment)):
        archive(place / "model.pt", pickled)
        try:
            with ckptx.open(place / "model.pt") as checkpoint:
                for tensor in checkpoint.values():
                    tensor.shape, tensor.dtype, tensor.nbytes
            if number == 0:
                ckptx.convert(place / "model.pt", place / "out", to="pytorch", overwrite=True)
        except ckptx.CkptxError as error:
            assert str(error).isprintable(), name
            refused += name in REFUSED
        except BaseException as error:
            raise SystemExit(f"{{name}}, {{number}}: {{error!r}}")
        left = {{path.name for path in place.iterdir()}}
        assert left <= {{"model.pt", "out", "out.ckptx-manifest.json"}}, (name, left)
print(refused, len(REFUSED))
"""


def test_the_api_refuses_what_is_hostile(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, there = map(int, done.stdout.split())
    assert refused > there
