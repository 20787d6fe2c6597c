"""``ckptx average``: torch computes what is expected, and what is no one model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ckptx
from ckptx.storage.gather import read
from ckptx.tensors.lazy import stored
from ckptx.tensors.mean import Renumbered, mean

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file


def a_model(write_llama, place: Path, seed: int, dtype=torch.float32, extra=(), **changes) -> Path:
    """Write a Llama of random weights."""
    write_llama(place, **changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        for name, value in load_file(place / "model.safetensors").items()
    }
    save_file({**tensors, **dict(extra)}, place / "model.safetensors", {"format": "pt"})
    return place


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


@pytest.fixture
def three(tmp_path, write_llama) -> list[Path]:
    return [a_model(write_llama, tmp_path / name, seed) for seed, name in enumerate("abc")]


def test_the_mean_is_torch_s_in_every_bit(tmp_path, write_llama, run):
    for dtype, other in ((torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        three = [a_model(write_llama, tmp_path / f"{dtype}{n}", n, dtype) for n in range(3)]
        held = [weights(place) for place in three]
        for options in ((), ("--dtype", other), ("--dtype", "fp16")):
            target = tmp_path / "-".join((str(dtype), "out", *options))
            code, out, err = run("average", *three, target, "--to", "hf", *options, "--json")
            assert (code, err) == (0, "")
            found = weights(target)
            assert found.keys() == held[0].keys()
            for name, tensor in found.items():
                a, b, c = (one[name].float() for one in held)
                assert torch.equal(tensor, ((a + b + c) / 3).to(tensor.dtype)), name
            said = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
            result = said[options[1]] if options else str(dtype).removeprefix("torch.")
            assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{result}"}
            (step,) = json.loads(out)["inexact"]
            assert step == f"mean of 3: {str(dtype).removeprefix('torch.')} -> {result}"
            assert len(json.loads(out)["inexact"][step]) == len(found)
            manifest = json.loads((target / "ckptx-manifest.json").read_text())
            rows = [row for file in manifest["files"].values() for row in file["tensors"]]
            assert all(f"compute {step}" in row["operations"] for row in rows)
            files = [[one["file"] for one in row["sources"]] for row in rows]
            assert files == [[f"{place.name}/model.safetensors" for place in three]] * len(rows)


def test_parts_of_a_mean_are_rounded_once(three, tmp_path, run):
    options = ("--dtype", "bf16", "--dtype", "*norm*=fp32")
    assert run("average", *three, tmp_path / "out", "--to", "hf", *options, "--quiet")[0] == 0
    held = [weights(place) for place in three]
    for name, tensor in weights(tmp_path / "out").items():
        expected = (held[0][name] + held[1][name] + held[2][name]) / 3
        assert torch.equal(tensor, expected if "norm" in name else expected.bfloat16())


def test_weights_count(three, tmp_path, run):
    target = tmp_path / "out"
    options = ("--to", "hf", "--weights", "0.5,0.3,0.2", "--json")
    code, out, _ = run("average", *three, target, *options)
    assert code == 0
    assert list(json.loads(out)["inexact"]) == ["mean of 3 by 0.5, 0.3, 0.2: float32 -> float32"]
    held = [weights(place) for place in three]
    for name, tensor in weights(target).items():
        a, b, c = (one[name] for one in held)
        assert torch.equal(tensor, a * 0.5 + b * 0.3 + c * 0.2)
    for wrong in ("0.5,0.5", "0.5,0.3,0.3", "1,1,x", "nan,0.5,0.5"):
        options = ("--to", "hf", "--weights", wrong)
        code, _, err = run("average", *three, tmp_path / "wrong", *options)
        assert code == 1
        assert err.startswith("error: weights: ")


def test_sources_of_several_formats_and_a_megatron_target(three, tmp_path, run):
    a, b, c = three
    options = ("--to", "core", "--tp", 2, "--pp", 2, "--quiet")
    assert run("convert", b, tmp_path / "megatron", *options)[0] == 0
    assert run("convert", c, tmp_path / "c.pt", "--to", "pytorch", "--quiet")[0] == 0
    assert run("average", a, b, c, tmp_path / "plain", "--to", "hf", "--quiet")[0] == 0
    mixed = (a, tmp_path / "megatron", tmp_path / "c.pt")
    for to in (("hf",), ("core", "--tp", 4), ("core", "--ckpt-format", "torch")):
        target = tmp_path / "-".join(map(str, to))
        options = ("--hf-base", a, "--verify", "--json")
        code, out, err = run("average", *mixed, target, "--to", *to, *options)
        assert (code, err) == (0, "")
        assert json.loads(out)["verification"]["equal"]
        assert ckptx.verify(target, tmp_path / "plain").equal


def test_tensors_without_a_mean_must_be_equal(tmp_path, write_llama, run):
    def named(name: str, number: int) -> Path:
        buffers = {"position_ids": torch.arange(number, number + 4), "mask": torch.tensor([True])}
        made = {"architectures": ["OwnModel"], "model_type": "own"}
        return a_model(write_llama, tmp_path / name, number, extra=buffers.items(), **made)

    a, b = named("a", 1), named("b", 2)
    code, _, err = run("average", a, b, tmp_path / "out", "--to", "hf")
    assert code == 1
    assert "'position_ids' is int64 [4] in " in err
    assert "only floating-point numbers have a mean" in err
    tensors = weights(b)
    tensors["position_ids"] = weights(a)["position_ids"]
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    assert run("average", a, b, tmp_path / "out", "--to", "hf", "--quiet")[0] == 0
    found = weights(tmp_path / "out")
    assert torch.equal(found["position_ids"], torch.arange(1, 5))
    assert found["mask"].dtype == torch.bool
    key = "model.norm.weight"
    assert torch.equal(found[key], (weights(a)[key] + tensors[key]) / 2)


def test_what_is_not_one_model_is_refused_by_name(three, tmp_path, write_llama, run):
    def changed(name: str, change) -> Path:
        place = a_model(write_llama, tmp_path / name, 7)
        config, tensors = json.loads((place / "config.json").read_text()), weights(place)
        change(config, tensors)
        (place / "config.json").write_text(json.dumps(config))
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        return place

    norm = "model.norm.weight"
    own = {"architectures": ["OwnModel"], "model_type": "own"}
    plain = changed("plain", lambda config, _: config.update(own))

    def lacking(config, tensors):
        config.update(own)
        del tensors[norm]

    def longer(config, tensors):
        config.update(own)
        tensors[norm] = torch.ones(17)

    def codes(config, tensors):
        config.update(own)
        tensors[norm] = tensors[norm].to(torch.float8_e4m3fn)

    cases = {
        (three[0], changed("base", lambda config, _: config.update(rope_theta=5e5))): "rotary_base",
        (three[0], changed("key", lambda config, _: config.update(eos_token_id=5))): "eos_token_id",
        (three[0], a_model(write_llama, tmp_path / "six", 1, num_hidden_layers=6)): "num_layers",
        (three[0], a_model(write_llama, tmp_path / "half", 1, torch.bfloat16)): "say with --dtype",
        (three[0], plain): "are not of one model: ",
        (plain, changed("lacking", lacking)): f"lacks {norm!r}",
        (changed("lacking2", lacking), plain): f"lacks {norm!r}",
        (plain, changed("longer", longer)): f"{norm!r} is float32 [16] in ",
        (changed("codes", codes), changed("codes2", codes)): f"{norm!r} is float8_e4m3fn, codes",
        (three[0], three[0]): "is given twice",
        (three[0],): "at least two",
    }
    for sources, said in cases.items():
        code, _, err = run("average", *sources, tmp_path / "out", "--to", "hf")
        assert code == 1
        assert said in err
        assert not (tmp_path / "out").exists()
    code, _, err = run("average", *three, tmp_path / "out", "--to", "peft")
    assert code == 1
    assert "the mean of their matrices is not" in err


def test_a_source_without_a_config_asks_for_one(three, tmp_path, run):
    assert run("convert", three[1], tmp_path / "b.pt", "--to", "pytorch", "--quiet")[0] == 0
    for sources in ((three[0], tmp_path / "b.pt"), (tmp_path / "b.pt", three[0])):
        code, _, err = run("average", *sources, tmp_path / "out", "--to", "hf")
        assert code == 1
        assert err.startswith(f"error: {tmp_path / 'b.pt'}: nothing beside the weights says")
        assert "give --hf-base" in err


def test_other_dtypes_meet_in_the_one_that_is_asked_for(three, tmp_path, write_llama, run):
    half = a_model(write_llama, tmp_path / "half", 1, torch.bfloat16)
    options = ("--to", "hf", "--dtype", "fp32", "--quiet")
    assert run("average", three[0], half, tmp_path / "out", *options)[0] == 0
    a, b = weights(three[0]), weights(half)
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, (a[name] + b[name].float()) / 2)


def test_another_tokenizer_is_named(three, tmp_path, run):
    for number, place in enumerate(three):
        (place / "tokenizer.json").write_text(f'{{"version": "{number // 2}"}}')
    code, out, _ = run("average", *three, tmp_path / "out", "--to", "hf", "--json")
    assert code == 0
    said = [note for note in json.loads(out)["notes"] if "tokenizer.json" in note]
    assert said == [f"tokenizer.json is that of {three[0]}; {three[2]} has another"]
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "0"}'


def test_a_dry_run_writes_nothing(three, tmp_path, run):
    options = ("--to", "hf", "--dry-run", "--json")
    code, out, _ = run("average", *three, tmp_path / "out", *options)
    assert code == 0
    assert list(json.loads(out)["inexact"]) == ["mean of 3: float32 -> float32"]
    assert not (tmp_path / "out").exists()


def test_python_takes_paths_and_open_checkpoints(three, tmp_path):
    with ckptx.open(three[0]) as first:
        report = ckptx.average([first, *three[1:]], tmp_path / "out", to="core", tp=2)
    assert list(report.inexact) == ["mean of 3: float32 -> float32"]
    by = {"weights": [0.25, 0.5, 0.25], "isolate": True}
    report = ckptx.average(three, tmp_path / "weighted", to="hf", **by)
    assert list(report.inexact) == ["mean of 3 by 0.25, 0.5, 0.25: float32 -> float32"]
    with pytest.raises(ckptx.PlanError, match="at least two"):
        ckptx.average(three[:1], tmp_path / "other", to="hf")


def test_an_element_does_not_depend_on_the_box(tmp_path):
    shape, files = (7, 5, 3), [tmp_path / "a", tmp_path / "b"]
    values = np.random.default_rng(0).standard_normal((2, *shape)).astype("f4")
    values[0, 0, 0] = np.inf, -np.inf, np.nan
    values[1, 0, 0] = -np.inf, 3e38, 1
    for file, array in zip(files, values, strict=True):
        file.write_bytes(array.tobytes())
    one, other = stored(0, 0, "float32", shape), Renumbered(1)(stored(0, 0, "float32", shape))
    for by in ((), (0.75, 0.25)):
        tensor = mean([one.permute((2, 0, 1)), other.permute((2, 0, 1))], by)
        whole = read(tensor, list(map(str, files)))
        for box in (((0, 3), (0, 1), (0, 5)), ((1, 2), (2, 6), (1, 4)), ((2, 3), (0, 7), (4, 5))):
            part = read(tensor, list(map(str, files)), box)
            assert part.tobytes() == whole[tuple(slice(*bounds) for bounds in box)].tobytes()
