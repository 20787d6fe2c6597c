"""What a training leaves beside Hugging Face weights is named in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from ckptx.cli import main as cli
from tests.conftest import write_llama


def test_state_of_accelerate_is_named_as_dropped(tmp_path, capsys):
    source = write_llama(tmp_path / "checkpoint-2")
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Linear(2, 2)
    optimizer = accelerator.prepare(torch.optim.AdamW(weight.parameters()))
    assert optimizer is not None
    accelerator.save_state(str(source), safe_serialization=True)
    state = {path.name for path in source.iterdir() if path.suffix in (".bin", ".pkl")}
    assert state == {"optimizer.bin", "random_states_0.pkl"}
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--no-config", "--json"]
        )
    assert not end.value.code
    dropped = json.dumps(json.loads(capsys.readouterr().out)["dropped"])
    assert all(name in dropped for name in state)
    assert not state & {path.name for path in (tmp_path / "out").iterdir()}


def test_what_lies_beside_latest_is_named_as_dropped(tmp_path, capsys):
    golden = Path(__file__).parents[1] / "golden" / "deepspeed" / "zero3_bf16"
    source = shutil.copytree(golden, tmp_path / "checkpoint-3")
    left = ("zero_to_fp32.py", "rng_state_0.pth", "training_args.bin")
    for name in left:
        (source / name).write_bytes(b"mine")
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--no-config", "--json"]
        )
    assert not end.value.code
    dropped = json.dumps(json.loads(capsys.readouterr().out)["dropped"])
    assert all(name in dropped for name in left)


def test_scripts_of_deepspeed_do_not_go_with_the_model(tmp_path, capsys):
    source = write_llama(tmp_path / "checkpoint-2")
    for name in ("zero_to_fp32.py", "modeling_mine.py"):
        (source / name).write_text("")
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--json"])
    assert not end.value.code
    assert "zero_to_fp32.py" in json.dumps(json.loads(capsys.readouterr().out)["dropped"])
    assert not (tmp_path / "out" / "zero_to_fp32.py").exists()
    assert (tmp_path / "out" / "modeling_mine.py").exists()
