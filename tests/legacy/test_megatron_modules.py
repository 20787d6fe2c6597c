from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def expected(tools, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return what the toy loader sends, from the module itself."""
    spec = importlib.util.spec_from_file_location("toy", tools.path / "loader_toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        f"{name}: {key}": tensor
        for name, message in module.weights(seed)
        for key, tensor in message.items()
    }


def test_module_to_module(tools):
    code, out, err = tools.convert(
        "--loader", "toy", "--saver", "toy", "--seed", "3", "--true-vocab-size", "19"
    )
    assert code == 0, err
    assert "Loading..." in err
    assert "Loading..." not in out
    state = torch.load(tools.target / "iter_0000007/mp_rank_00/toy.pt", weights_only=False)
    for name, tensor in expected(tools).items():
        message, _, key = name.partition(": ")
        assert torch.equal(state[message][key], tensor), name
    assert state["md"]["params_dtype"] is torch.bfloat16
    assert state["md"]["true_vocab_size"] == 19
    assert state["md"]["consumed_train_samples"] == 11
    assert state["md"]["checkpoint_args"]["num_query_groups"] == 2
    assert state["md"]["checkpoint_args"]["rotary_base"] == 500000
    assert state["seen"] == {"tp": 1, "load_dir": str(tools.source), "true_vocab_size": 19}
    assert (tools.target / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert [p.name for p in tools.target.parent.glob("*partial*")] == []


def test_loader_sees_the_arguments_that_megatron_gives(tools):
    code, _, err = tools.convert("--loader", "toy", "--saver", "toy", "--seed", "3")
    assert code == 0, err
    args = json.loads((tools.source / "args.json").read_text())
    assert args["load_dir"] == str(tools.source)
    assert args["save_dir"]
    known = {key: args[key] for key in ("model_type", "loader", "saver", "checking", "seed")}
    assert known == {
        "model_type": "GPT",
        "loader": "toy",
        "saver": "toy",
        "checking": True,
        "seed": 3,
    }
    assert args["max_queue_size"] == 50
    assert args["megatron_path"] is None
    assert args["target_tensor_parallel_size"] is None


def test_module_to_hugging_face_and_back(tools):
    code, _, err = tools.convert(
        "--loader", "toy", "--saver", "hf", "--seed", "3", "--true-vocab-size", "20"
    )
    assert code == 0, err
    tensors = load_file(tools.target / "model.safetensors")
    sent = expected(tools)
    layer = "model.layers.1."
    assert torch.equal(
        tensors[f"{layer}mlp.gate_proj.weight"], sent["transformer layer 1: mlp l0 weight W"]
    )
    assert torch.equal(
        tensors[f"{layer}mlp.down_proj.weight"], sent["transformer layer 1: mlp l1 weight"]
    )
    fused = sent["transformer layer 1: qkv weight"].view(2, 4, 2, 8)  # groups, 2q + k + v, rows
    assert torch.equal(tensors[f"{layer}self_attn.q_proj.weight"], fused[:, :2].reshape(8, 8))
    assert torch.equal(tensors[f"{layer}self_attn.k_proj.weight"], fused[:, 2].reshape(4, 8))
    config = json.loads((tools.target / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    back = tools.target.parent / "back"
    tools.source, tools.target = tools.target, back
    code, _, err = tools.convert("--loader", "hf", "--saver", "toy")
    assert code == 0, err
    state = torch.load(next(back.glob("*/*/toy.pt")), weights_only=False)
    for name, tensor in sent.items():
        message, _, key = name.partition(": ")
        assert torch.equal(state[message][key], tensor), name


def test_module_without_a_prefix_is_found_too(tools):
    (tools.path / "saver_toy.py").rename(tools.path / "toy.py")
    code, _, err = tools.convert("--loader", "toy", "--saver", "toy", "--seed", "3")
    assert code == 0, err


def test_megatron_path_is_searched(tools):
    code, _, err = tools.convert(
        "--loader", "toy", "--saver", "toy", "--seed", "3", path=tools.source
    )
    assert code == 1
    assert "unknown loader 'toy'" in err
    checkout = tools.path.parent / "megatron"
    (checkout / "tools").mkdir(parents=True)
    tools.path.rename(checkout / "tools" / "checkpoint")
    code, _, err = tools.convert(
        "--loader", "toy", "--saver", "toy", "--seed", "3", "--megatron-path", str(checkout),
        path=tools.source,
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--seed", "3", "--fault", "raise"],
            1,
            "loader module loader_toy failed: RuntimeError: toy",
        ),
        (["--seed", "3", "--fault", "exit"], 1, "loader module loader_toy called exit(1)"),
        (["--seed", "3", "--fault", "no done"], 1, "returned without sending 'done'"),
        (["--seed", "3", "--fault", "order"], 1, "sent 'transformer layer 1' out of order"),
        (["--seed", "3", "--saver-fault", "exit"], 1, "saver module saver_toy called exit(1)"),
        (["--seed", "3", "--saver-fault", "early"], 1, "returned before it had read everything"),
        (["--seed", "x"], 2, "argument --seed: invalid int value: 'x'"),
        ([], 2, "the following arguments are required: --seed"),
        (["--seed", "3", "--true-vocab", "3"], 2, "--true-vocab"),
        (["--seed", "3", "--two"], 2, "--two"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(tools, arguments, code, message):
    found, _, err = tools.convert("--loader", "toy", "--saver", "toy", *arguments)
    assert found == code, err
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert not tools.target.exists()
    assert not list(tools.target.parent.glob("*partial*"))


def test_no_checking_relaxes_the_order_only(tools):
    code, _, err = tools.convert(
        *("--loader", "toy", "--saver", "hf", "--seed", "3", "--true-vocab-size", "20"),
        *("--fault", "order", "--no-checking"),
    )
    assert code == 0, err
    assert Path(tools.target / "model.safetensors").exists()


def test_help_shows_the_options_of_modules(tools):
    code, out, _ = tools.convert("--loader", "toy", "--saver", "toy", "--help")
    assert code == 0
    assert "--seed SEED" in out
    assert "Toy saver" in out
