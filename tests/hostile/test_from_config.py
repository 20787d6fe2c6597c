"""``ckptx from-config``: RLinf's configurations, as users have them and as they should not be."""

from __future__ import annotations

import shlex

import pytest
import torch
import yaml
from safetensors.torch import load_file


def as_rlinf_ships_it(user):
    """The keys of fsdp_model_convertor.yaml @ a3816b5, with places of this test."""
    return {
        "defaults": ["model/openvla_oft@model", {"override hydra/job_logging": "stdout"}],
        "hydra": {"run": {"dir": "."}, "searchpath": ["file://${oc.env:REPO_PATH}/examples"]},
        "convertor": {
            "save_path": str(user.target),
            "merge_lora_weighs": True,
            "ckpt_path": str(user.source / "full_weights.pt"),
            "torch_dtype": None,
        },
        "model": {
            "model_type": "openvla_oft",
            "model_path": str(user.place / "base"),
            "unnorm_key": "bridge_orig",
            "is_lora": False,
            "lora_rank": 32,
            "max_prompt_length": 30,
        },
    }


@pytest.fixture
def config(user, write_llama):
    """Write a configuration for a whole state dict and its base; ``change`` edits it before."""
    base = write_llama(user.place / "base")
    user.source.mkdir()
    torch.save(load_file(base / "model.safetensors"), user.source / "full_weights.pt")
    user.file = user.place / "rlinf.yaml"

    def written(change=lambda config: None, **convertor):
        content = as_rlinf_ships_it(user)
        content["convertor"].update(convertor)
        change(content)
        user.file.write_text(yaml.safe_dump(content, sort_keys=False))
        return user.file

    return written


def test_a_configuration_is_run_and_its_command_shown(user, config):
    assert user.run("from-config", config()) == 0
    first = user.output.splitlines()[0]
    words = shlex.split(first)
    assert words[:4] == ["ckptx", "convert", str(user.source / "full_weights.pt"), str(user.target)]
    assert words[4:] == ["--to", "hf", "--hf-base", str(user.place / "base")]
    unused = "defaults, hydra, model.model_type, model.unnorm_key, model.lora_rank"
    assert f"not needed, since no model is built: {unused}" in user.errors
    assert (user.target / "model.safetensors").read_bytes() == (
        user.place / "base" / "model.safetensors"
    ).read_bytes()
    # The command that was shown does the same.
    other = user.place / "other"
    words[3] = str(other)
    assert user.run(*words[1:]) == 0
    for file in user.target.iterdir():
        if file.name != "ckptx-manifest.json":
            assert file.read_bytes() == (other / file.name).read_bytes()


def test_it_may_only_be_shown(user, config):
    assert user.run("from-config", config(torch_dtype="fp16"), "--print-only") == 0
    assert user.output.strip().endswith("--dtype fp16")
    assert not user.target.exists()


def test_settings_and_options_on_the_command_line(user, config):
    file = config()
    settings = ["convertor.torch_dtype=bf16", f"convertor.save_path={user.place / 'elsewhere'}"]
    assert user.run("from-config", file, *settings, "--max-shard-size", "500MB", "--quiet") == 0
    assert user.output == user.errors == ""
    weights = load_file(user.place / "elsewhere" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not user.target.exists()


def without_model(config):
    del config["model"]


def test_a_training_configuration_near_the_checkpoint_is_found(user, config):
    training = {"actor": {"model": {"model_path": str(user.place / "base"), "is_lora": False}}}
    folder = user.place / "tensorboard"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(training))
    assert user.run("from-config", config(without_model), "--print-only") == 0
    assert f"--hf-base {user.place / 'base'}" in user.output
    assert "tensorboard/config.yaml" in user.errors
    file = config(without_model, auto_find_train_config=False)
    assert user.run("from-config", file, "--print-only") == 0
    assert "--hf-base" not in user.output
    named = {"train_config_path": str(folder / "config.yaml")}
    file = config(**named, model_overrides={"model_path": "/elsewhere"})
    assert user.run("from-config", file, "--print-only") == 0
    assert "--hf-base /elsewhere" in user.output


@pytest.mark.parametrize(
    ("change", "convertor", "reason"),
    [
        (None, {"merge_lora_wieghs": True}, "convertor.merge_lora_wieghs is no setting"),
        (None, {"save_path": None}, "convertor.save_path is not set; give convertor.save_path="),
        (None, {"ckpt_path": "${oc.env:HOME}/x"}, "expected a path without references"),
        (None, {"ckpt_path": 7}, "convertor.ckpt_path is 7, expected a path"),
        (None, {"torch_dtype": "int4"}, "convertor.torch_dtype is 'int4', expected one of"),
        (None, {"strict_load": "yes please"}, "expected true or false"),
        (None, {"train_config_path": "/nowhere.yaml"}, "/nowhere.yaml: no such file"),
        (
            lambda c: c["model"].update(is_lora=True, lora_rank=None),
            {},
            "model.lora_rank is None, expected a number",
        ),
        (
            lambda c: c["model"].update(is_lora=True, lora_path="/nowhere"),
            {"merge_lora_weighs": False},
            "/nowhere/adapter_config.json: cannot be opened: No such file or directory",
        ),
        (lambda c: c["model"].update(is_lora=True), {}, "holds no LoRA weights"),
        (lambda c: c.pop("convertor"), {}, "expected a section 'convertor'"),
        (lambda c: c.update(model=[1]), {}, "expected a section 'model'"),
    ],
)
def test_what_a_configuration_must_not_say(change, convertor, reason, user, config):
    file = config(change or (lambda config: None), **convertor)
    assert reason in user.is_refused("from-config", file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("convertor: [", "not valid YAML"),
        ("- 1", "expected a mapping with 'convertor'"),
        ("", "expected a mapping with 'convertor'"),
        ("!!python/object/apply:os.system [id]", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(text, reason, user):
    user.file = user.place / "rlinf.yaml"
    user.file.write_text(text)
    assert reason in user.is_refused("from-config", user.file)
