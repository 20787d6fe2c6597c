"""Meta's directories through the kit, Megatron's options for them, and what is bad in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ckptx.errors import CkptxError, FormatError, PlanError, SchemaError
from ckptx.protocol.context import Context
from ckptx.protocol.messages import Begin
from ckptx.registry import registry
from ckptx.testing import faults
from ckptx.testing.contracts import (
    Checkpoint,
    LoaderTests,
    SaverTests,
    assert_equal,
    assert_one_line,
)
from ckptx.testing.conversion import begin_of, convert, end_of, loaded, save, values
from ckptx.testing.models import Arrays, TinyModel, messages, tiny, write_hf
from ckptx.testing.tagged import tagged

from .by_hand import cut, torch_of

LOADER, SAVER = registry.loader("meta"), registry.saver("meta")
MEGATRON = registry.loader("llama_mistral")
NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_query_groups": 4,
    "ffn_hidden_size": 88,
    "vocab_size": 40,
    "kv_channels": 4,
}


def llama(name: str = "llama", **changes: Any) -> TinyModel:
    return tiny("llama", name, **(SIZES | changes))


LLAMAS = (
    llama(),
    llama("llama-mha", num_query_groups=8, dtype="float16"),
    llama("llama-tied", tied=True),
    llama("llama-norms", norm_dtype="float32", rotary_base=500000.0, num_layers=2),
    llama("llama-square", ffn_hidden_size=32, vocab_size=32, num_query_groups=8, num_layers=2),
)
MISTRAL = tiny("mistral", **(SIZES | {"kv_channels": 6, "max_position_embeddings": 32768}))


def params_of(model: TinyModel) -> dict[str, Any]:
    spec = model.spec
    params = {
        "dim": spec.hidden_size,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_attention_heads,
        "n_kv_heads": spec.num_query_groups,
        "norm_eps": spec.norm_epsilon,
        "rope_theta": spec.rotary_base,
        "vocab_size": -1,
    }
    if spec.family == "mistral":
        return params | {"head_dim": spec.kv_channels, "hidden_dim": spec.ffn_hidden_size}
    # int(8 * 32 / 3) is 85: rounded up to 88, or 0.3 of it, 25, to 32.
    factor = {} if spec.ffn_hidden_size == 88 else {"ffn_dim_multiplier": 0.3}
    return params | {"multiple_of": spec.ffn_hidden_size, **factor}


def meta_arrays(model: TinyModel, shards: int, rank: int, *, by_width: bool) -> Arrays:
    """What a shard holds, by numpy: query and key rows of a head from halves to neighbours."""
    whole = model.hf()
    embedding = whole["model.embed_tokens.weight"]
    found = {
        "tok_embeddings.weight": cut(embedding, int(by_width), shards, rank),
        "norm.weight": whole["model.norm.weight"],
        "output.weight": cut(whole.get("lm_head.weight", embedding), 0, shards, rank),
    }
    for layer in range(model.spec.num_layers):
        for theirs, (ours, axis) in NAMES.items():
            array = whole[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                head, half = model.spec.kv_channels, model.spec.kv_channels // 2
                order = [i // 2 + i % 2 * half for i in range(head)]
                array = array.reshape(-1, head, array.shape[-1])[:, order].reshape(array.shape)
            found[f"layers.{layer}.{ours}.weight"] = cut(array, axis, shards, rank)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def write_meta(
    directory: Path, model: TinyModel, shards: int = 1, *, by_width: bool = False
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params_of(model)))
    for rank in range(shards):
        arrays = meta_arrays(model, shards, rank, by_width=by_width)
        state = {name: torch_of(array) for name, array in arrays.items()}
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
    return directory


class TestShards(LoaderTests, SaverTests):
    loader, saver = LOADER, SAVER
    models = LLAMAS
    shards, by_width = 2, False

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        write_meta(directory, model, self.shards, by_width=self.by_width)
        return Checkpoint(directory, model.canonical())

    def option_sets(self):
        return [
            {},
            {"target_shards": 2},
            {"target_shards": 2, "embedding_split": "vocabulary"},
            {"target_shards": 4, "embedding_split": "width"},
            {"consolidated": "safetensors"},
        ]


class TestByWidth(TestShards):
    models = LLAMAS[:3]
    shards, by_width = 4, True


class TestOneFile(LoaderTests, SaverTests):
    loader, saver = LOADER, SAVER
    models = (MISTRAL,)

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        (directory / "params.json").write_text(json.dumps(params_of(model)))
        arrays = meta_arrays(model, 1, 0, by_width=False)
        torch_file = {name: torch_of(array) for name, array in arrays.items()}
        _safetensors(torch_file, directory / "consolidated.safetensors")
        return Checkpoint(directory, model.canonical())


def _safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file as save_torch_file

    save_torch_file(tensors, path)


def test_padding_is_cut(tmp_path):
    model = llama(rows=64)
    target = save(SAVER, messages(model, tmp_path / "s"), tmp_path / "t", {"target_shards": 4})
    assert_equal(loaded(LOADER, target), model.canonical(padded=False))
    assert json.loads((target / "params.json").read_bytes())["vocab_size"] == 40


def test_frequencies_are_dropped_by_name(tmp_path):
    directory = write_meta(tmp_path, LLAMAS[0], 2)
    for file in directory.glob("*.pth"):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"rope.freqs": torch.ones(2)}, file)
    sent = list(LOADER.load(directory, {}))
    assert [drop.name for drop in end_of(sent).dropped] == [
        "consolidated.00.pth: rope.freqs",
        "consolidated.01.pth: rope.freqs",
    ]


def test_views_of_one_storage_are_whole_tensors(tmp_path):
    """Meta saved the tensors of a shard as parts of one storage."""
    model = LLAMAS[0]
    directory = write_meta(tmp_path, model)
    file = directory / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    store = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    position = 0
    for name, tensor in state.items():
        state[name] = store[position : position + tensor.numel()].view(tensor.shape)
        position += tensor.numel()
    torch.save(state, file)
    assert_equal(loaded(LOADER, directory), model.canonical())


def test_small_files_and_the_config_ride_along(tmp_path):
    source = write_hf(tmp_path / "hf", LLAMAS[0])
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    target = convert(registry.loader("hf"), source, SAVER, tmp_path / "meta")
    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert registry.detect(target) == "meta"
    back = convert(LOADER, target, registry.saver("hf"), tmp_path / "back")
    assert not (back / "params.json").exists()
    assert (back / "tokenizer.model").read_bytes() == b"sentencepiece"


def test_a_directory_with_both_kinds_of_weights_is_hugging_faces(tmp_path):
    """As Mistral publishes them."""
    directory = write_hf(tmp_path, MISTRAL)
    (directory / "params.json").write_text(json.dumps(params_of(MISTRAL)))
    save_file({"norm.weight": np.ones(32)}, directory / "consolidated.safetensors")
    assert registry.detect(directory) == "hf"
    assert_equal(loaded(registry.loader("hf"), directory), MISTRAL.canonical())


def test_a_config_says_what_params_cannot(tmp_path):
    directory = write_meta(tmp_path / "meta", LLAMAS[0])
    base = write_hf(tmp_path / "base", llama(max_position_embeddings=777))
    sent = list(LOADER.load(directory, {}, Context(hf_base=base)))
    assert begin_of(sent).parts["language"].max_position_embeddings == 777
    assert end_of(sent).notes == ()
    assert "4096 is assumed" in end_of(list(LOADER.load(directory, {}))).notes[0]


def _changed(**change: Any):
    def change_params(directory: Path) -> None:
        path = directory / "params.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))

    return change_params


def _renumbered(directory: Path) -> None:
    (directory / "consolidated.01.pth").rename(directory / "consolidated.02.pth")


def _third(directory: Path) -> None:
    faults.duplicate(directory / "consolidated.01.pth", "consolidated.02.pth")


def _both(directory: Path) -> None:
    save_file({"norm.weight": np.ones(32)}, directory / "consolidated.safetensors")


def _extra(directory: Path) -> None:
    file = directory / "consolidated.01.pth"
    torch.save(torch.load(file, weights_only=True) | {"adapter": torch.ones(2)}, file)


def _of_another_model(directory: Path) -> None:
    arrays = meta_arrays(llama(num_layers=5), 2, 1, by_width=False)
    state = {name: torch_of(array) for name, array in arrays.items()}
    torch.save(state, directory / "consolidated.01.pth")


@pytest.mark.parametrize(
    ("injure", "said"),
    [
        (lambda d: faults.drop(d / "consolidated.01.pth"), "found 1 shards, expected 2: .*copy"),
        (lambda d: faults.drop(d / "consolidated.00.pth"), "missing: 'consolidated.00.pth'"),
        (_renumbered, "1 of 3 shards are missing: 'consolidated.01.pth'"),
        (_third, "found 3 shards, expected 2"),
        (_both, "both consolidated.00.pth and consolidated.safetensors"),
        (_extra, "'consolidated.01.pth: adapter'"),
        (_of_another_model, "9 tensors are not part of it"),
        (_changed(n_layers=5), "9 tensors are missing"),
        (_changed(n_layers=3), "18 tensors are not part of it"),
        (_changed(n_kv_heads=8), "key has 8 rows, the config says 16"),
        (_changed(n_kv_heads=1), "1 query groups do not divide over 2 ranks"),
        (_changed(dim=64), "found 2 shards, expected 4"),
        (_changed(multiple_of=64), "feed-forward layer of 128 rows, the shards hold 88"),
        (_changed(vocab_size=41), "vocab_size is 41, the shards hold 40"),
        (_changed(moe={"num_experts": 8}), "'moe'"),
        (lambda d: (d / "params.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "params.json").write_text("[]"), "expected a JSON object"),
        (lambda d: faults.drop(d / "params.json"), "holds no params.json"),
    ],
)
def test_what_does_not_fit_together_is_one_line(injure, said, tmp_path):
    directory = write_meta(tmp_path, LLAMAS[0], 2)
    injure(directory)
    with pytest.raises(CkptxError, match=said) as error:
        list(LOADER.load(directory, {}))
    assert_one_line(error.value)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (llama(vocab_size=37), {"target_shards": 2}, "37 words of the vocabulary do not divide"),
        (llama(), {"target_shards": 8}, "4 key heads do not divide over 8 shards"),
        (llama(), {"target_shards": 3}, "8 attention heads do not divide over 3"),
        (llama(kv_channels=6), {}, "heads of 6 rows"),
        (tiny("qwen2", **SIZES), {}, "family qwen2 has no meta layout"),
        (llama(add_bias_linear=True), {}, "cannot hold"),
        (MISTRAL, {"target_shards": 2, "consolidated": "safetensors"}, "need --consolidated pth"),
    ],
)
def test_what_metas_model_cannot_hold_is_one_line(model, options, said, tmp_path):
    split = {"embedding_split": "vocabulary"}
    with pytest.raises(CkptxError, match=said) as error:
        SAVER.plan(iter(messages(model, tmp_path)), split | options)
    assert_one_line(error.value)


def megatron(source: Path, dtype: str | None = None, **options: Any) -> list[Any]:
    own = {"checkpoint_type": "meta", **options}
    return list(MEGATRON.load(source, own, Context(dtype=dtype)))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("llama2-7B", "layers 4 .not 32., attention heads 8 .not 32., key heads 4 .not 32., sha"),
        ("llama3-70Bf", "shards 2 .not 8."),
        ("mistral", "of family llama .not mistral."),
    ],
)
def test_a_wrong_model_size_is_one_line(size, said, tmp_path):
    directory = write_meta(tmp_path, LLAMAS[0], 2)
    with pytest.raises(SchemaError, match=f"--model-size {size} is not this model: .*{said}") as e:
        megatron(directory, model_size=size)
    assert_one_line(e.value)
    source = write_hf(tmp_path / "hf", LLAMAS[0])
    with pytest.raises(SchemaError, match=f"--model-size {size} is not this model: config.json"):
        megatron(source, model_size=size, checkpoint_type="hf")


@pytest.mark.parametrize("size", ["yi-34B", "qwen2.5-7B"])
def test_models_that_meta_has_not_published_are_refused(size, tmp_path):
    with pytest.raises(PlanError, match=f"{size} has no Meta files"):
        megatron(tmp_path, model_size=size)


def test_the_right_model_size_is_taken(tmp_path):
    model = tiny(
        "llama",
        num_layers=32,
        num_attention_heads=32,
        num_query_groups=32,
        hidden_size=64,
        kv_channels=2,
        ffn_hidden_size=176,  # int(8 * 64 / 3) is 170
        vocab_size=40,
        norm_epsilon=1e-6,
    )
    directory = write_meta(tmp_path / "root" / "llama2-7Bf", model)
    sent = megatron(directory.parent, model_size="llama2-7Bf", vocab_file=None)
    assert_equal(values(sent), model.canonical())
    # Llama 1 and an early Llama 2 have the same numbers: the name tells.
    assert begin_of(sent).parts["language"].max_position_embeddings == 4096


def test_flags_of_megatron(tmp_path):
    directory = write_meta(tmp_path / "meta", LLAMAS[0])
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"sentencepiece")
    more = {"tokenizer_model": str(tokenizer), "true_vocab_size": 40, "fp16": True}
    sent = megatron(directory, model_size="llama3", **more)
    begin = sent[0]
    assert isinstance(begin, Begin)
    assert begin.sidecars["tokenizer.model"] == b"sentencepiece"
    spec = begin.parts["language"]
    assert (spec.vocab_size, spec.dtype) == (40, "float16")
    assert {array.dtype.name for keys in values(sent).values() for array in keys.values()} == {
        "float16"
    }
    for wrong in ({"fp16": True, "bf16": True}, {"bf16": True, "dtype": "float32"}):
        with pytest.raises(PlanError, match=r"exclude|contradict"):
            megatron(directory, model_size="llama3", **wrong)


def test_unknown_architectures_are_not_taken_for_a_size(tmp_path):
    write_hf(tmp_path, LLAMAS[0])
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(SchemaError, match="not a model of family llama"):
        megatron(tmp_path, model_size="llama3", checkpoint_type="hf")


def test_a_file_of_another_kind_is_an_error(tmp_path):
    directory = write_meta(tmp_path, LLAMAS[0])
    torch.save([torch.ones(2)], directory / "consolidated.00.pth")
    with pytest.raises(FormatError, match="plain state dict"):
        list(LOADER.load(directory, {}))


def test_missing_numbered_safetensors_are_seen(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params_of(MISTRAL)))
    name = "consolidated-00001-of-00002.safetensors"
    save_file({"norm.weight": tagged("norm", "float32", (32,))}, tmp_path / name)
    with pytest.raises(FormatError, match="says that there are 2 files, found 1"):
        list(LOADER.load(tmp_path, {}))
