"""Generation from tiny random models, by real transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles import hf

pytest.importorskip("transformers")
from ckptx.errors import FormatError
from ckptx.verification.frameworks import child, generation
from ckptx.verification.frameworks.generate import Generated, generate
from ckptx.verification.frameworks.worker import SideError

JOB = {
    "dtype": None,
    "device": "cpu",
    "tokenizer": None,
    "image": None,
    "prompts": [],
    "prompt_ids": [[1, 2, 3]],
    "max_new_tokens": 6,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "sample": False,
    "seed": 0,
    "samples": 0,
    "trust_remote_code": False,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama") / "hf"
    hf.llama(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    hf.tokenizer(directory)
    return directory


def greedy(directory, tokens, count):
    """What a loop over the model's own logits continues with."""
    for _ in range(count):
        last = hf.logits(directory, torch.tensor([tokens]))[0, -1]
        tokens = [*tokens, int(last.argmax())]
    return tokens[-count:]


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "ckptx", "generate", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def ask(directory, **changes):
    return generation.generate(JOB | {"model": str(directory)} | changes)


def test_the_command_continues_text(llama, tokenizer, tmp_path):
    results = tmp_path / "results.json"
    done = run(
        llama,
        *("--tokenizer", tokenizer, "--prompt", "The capital of France is"),
        *("--max-new-tokens", 4, "--benchmark", "--samples", 2),
        *("--device", "cpu", "--json", "--output-file", results),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads(results.read_text())
    (one,) = answer["generations"]
    expected = greedy(llama, [1, 2, 3, 4, 5], 4)
    assert one["prompt_tokens"] == [1, 2, 3, 4, 5]
    assert one["tokens"] == expected
    words = ["<unk>", "The", "capital", "of", "France", "is"]
    assert one["text"] == " ".join(words[n] if n < 6 else f"w{n}" for n in expected)
    assert len(one["benchmark"]["samples"]) == 2
    assert one["benchmark"]["tokens_per_second"] > 0
    assert answer["class"] == "LlamaForCausalLM"


def test_tokens_need_no_tokenizer(llama):
    (one,) = ask(llama)["generations"]
    assert one["tokens"] == greedy(llama, [1, 2, 3], 6)
    assert one["text"] is None


def test_samples_of_one_seed_are_equal(llama):
    def tokens(seed):
        answer = ask(llama, sample=True, temperature=5.0, top_k=50, top_p=0.99, seed=seed)
        return answer["generations"][0]["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize("copied", [False, True])
def test_a_tied_head_is_no_fault(copied, tmp_path):
    hf.qwen2(tmp_path / "hf", tied=True)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in weights
    if copied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (one,) = ask(tmp_path / "hf")["generations"]
    assert one["tokens"] == greedy(tmp_path / "hf", [1, 2, 3], 6)


def without(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def with_another(weights):
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def of_another_shape(weights):
    weights["model.norm.weight"] = torch.ones(7)


def not_a_number(weights):
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without, "are missing, so their weights would be random: .*layers.1.mlp.up_proj"),
        (with_another, "in the files and not in the model: .*layers.9"),
        (of_another_shape, "have other shapes than the model, .*model.norm.weight"),
        (not_a_number, "NaN"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(damage, said, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    weights = load_file(llama / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SideError, match=said):
        ask(tmp_path / "hf")


def test_nothing_generated_is_an_error(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    (first,) = greedy(llama, [1, 2, 3], 1)
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    with pytest.raises(SideError, match="the first token ends the text"):
        ask(tmp_path / "hf")


def test_a_token_outside_the_vocabulary(llama):
    with pytest.raises(SideError, match=r"token 131 .* vocabulary of 131"):
        ask(llama, prompt_ids=[[1, 131]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "holds no tokenizer; name the directory of one with --tokenizer, or give tokens"),
        (("--prompt-ids", "1 x"), 'write "1 2 3"'),
        (("--prompt-ids", "1", "--output-file", "/nowhere/r.json"), "its directory does not exist"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, llama):
    done = run(llama, *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not done.stdout


def cut_off(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])


def without_weights(directory):
    (directory / "model.safetensors").unlink()


def of_an_unknown_model(directory):
    config = {"model_type": "foo", "architectures": ["FooForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))


def with_a_damaged_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_off, "cannot load it: SafetensorError: .*'ckptx inspect .*hf' says whether"),
        (without_weights, "cannot load it: OSError: Error no file named model.safetensors"),
        (of_an_unknown_model, "cannot read its config: .*does not recognize this architecture$"),
        (with_a_damaged_tokenizer, "cannot read its tokenizer: "),
    ],
)
def test_what_transformers_cannot_read_is_named(damage, said, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(SideError, match=f"^{tmp_path}/hf: transformers {said}"):
        ask(tmp_path / "hf")


def test_a_damaged_config_is_named_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setattr(child, "ask", None)
    with pytest.raises(FormatError, match=r"config\.json: not valid JSON"):
        generate(tmp_path, JOB)


def test_text_stands_beside_its_label():
    answer = {
        "class": "LlamaForCausalLM",
        "parameters": 1234,
        "dtype": "float32",
        "device": "cpu",
        "load_seconds": 1.25,
        "sampling": {"temperature": 1.0, "top_p": None, "top_k": None, "seed": 3},
        "generations": [
            {
                "prompt": "def f():",
                "prompt_tokens": [1],
                "tokens": [2, 3],
                "text": "\n    return one, two, three, four\n\nend",
            }
        ],
    }
    assert Generated(answer).render(30).split("\n") == [
        "prompt    def f():",
        "generated",
        "              return one, two,",
        "          three, four",
        "",
        "          end",
        "",
        "LlamaForCausalLM, 1,234",
        "parameters, float32 on cpu:",
        "every weight was found; loaded",
        "in 1.2 s; 2 tokens generated,",
        "sampled with seed 3",
    ]


def test_a_checkpoint_of_another_format(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "format 'core': convert it --to hf first" in done.stderr


def test_a_shard_that_was_cut_short_is_named(llama, tmp_path):
    directory = tmp_path / "cut"
    shutil.copytree(llama, directory)
    path = next(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    done = run(directory, "--prompt-ids", "1 2 3")
    assert done.returncode == 1
    assert f"error: {path}: expected" in done.stderr
    assert "it is truncated" in done.stderr
