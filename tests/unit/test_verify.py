"""What ``ckptx verify`` compares, how it pairs tensors, and what it says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptx import cli
from ckptx.verify import Comparison, Difference, compare

WEIGHTS = "model.safetensors"


def edit(directory, change, **config):
    """Change the tensors of a model directory, and its config."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(
        {name: np.ascontiguousarray(one) for name, one in tensors.items()},
        directory / WEIGHTS,
        {"format": "pt"},
    )
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def both(tmp_path, write_llama):
    """Two copies of one model."""
    a = write_llama(tmp_path / "a")
    return a, shutil.copytree(a, tmp_path / "b")


@pytest.fixture
def run(capsys):
    """Run the command line; return its exit code, stdout and stderr."""

    def ran(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(one) for one in arguments])
        return stopped.value.code, *capsys.readouterr()

    return ran


def nudge(tensors, by=1e-4):
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(by)


def test_exit_codes(both, run, tmp_path):
    a, b = both
    assert run("verify", a, b)[0] == 0
    edit(b, nudge)
    assert run("verify", a, b)[0] == 1
    (b / WEIGHTS).write_bytes(b"no weights")
    code, out, err = run("verify", a, b)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    for arguments in ([a], [a, tmp_path / "nowhere"], [a, b, "--against-manifest", b / WEIGHTS]):
        assert run("verify", *arguments)[0] == 2


def test_tolerance(both, run):
    a, b = both
    edit(b, nudge)
    assert run("verify", a, b, "--atol", "1e-5")[0] == 1
    code, out, _ = run("verify", a, b, "--atol", "1e-3")
    assert code == 0
    assert "1 tensors differ within the tolerance, at most by 0.0001" in out


def test_dtypes(both, run):
    a, b = both
    edit(a, lambda tensors: tensors.update({n: t.astype(np.float16) for n, t in tensors.items()}))
    edit(
        b,
        lambda tensors: tensors.update(
            {n: t.astype(np.float16).astype(np.float32) for n, t in tensors.items()}
        ),
    )
    code, out, _ = run("verify", a, b)
    assert code == 1
    assert "the same values in another dtype" in out
    assert run("verify", a, b, "--ignore-dtype")[0] == 0
    assert run("verify", a, b, "--rtol", "1e-6")[0] == 0
    edit(b, nudge)
    assert run("verify", a, b, "--ignore-dtype")[0] == 1


def test_json(both, run):
    a, b = both

    def change(tensors):
        gate, up = (f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32("nan")

    edit(b, change)
    report = json.loads(run("verify", a, b, "--json")[1])
    assert report["equal"] is False
    assert report["counts"] == {"different": 3}
    first, *_ = report["differences"]
    assert first["name"] == "final norm: weight"
    assert first["max_abs"] == "inf"
    assert (first["elements"], first["of"]) == (16, 16)
    found = {tuple(one["mistakes"]): one for one in report["diagnoses"]}
    assert set(found) == {("gate-up-exchanged",), ("not-a-number",)}
    gate = found["gate-up-exchanged",]
    assert (len(gate["explains"]), gate["of"], gate["exact"]) == (2, 3, True)
    without = json.loads(run("verify", a, b, "--json", "--no-diagnosis")[1])
    assert without["diagnoses"] == []


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_text_fits(both, width):
    a, b = both
    edit(b, lambda tensors: tensors.update({n: t + 1 for n, t in tensors.items()}))
    comparison = compare(a, b)
    text = comparison.render(width)
    assert max(map(len, text.splitlines())) <= max(
        width, 60
    )  # names and the summary are not broken
    assert text.splitlines()[-1].startswith("not equal: 31 different of 31 tensors")


def test_missing_and_extra(both):
    """A model that lacks tensors cannot be converted, but it can be compared."""
    a, b = both
    edit(a, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    edit(b, lambda tensors: tensors.pop("lm_head.weight"))
    comparison = compare(a, b)
    found = {one.name: one.kind for one in comparison.differences}
    assert found == {
        "output layer: weight": "missing",
        "transformer layer 1: mlp l0 weight V": "extra",
    }
    assert all("does not fit its own config" in note for note in comparison.notes)


def test_tensors_that_do_not_fit_the_config(both):
    a, b = both
    edit(b, lambda tensors: tensors.update({"stray": np.ones(3, np.float32)}))
    comparison = compare(a, b)
    (difference,) = comparison.differences
    assert (difference.name, difference.kind) == ("stray", "extra")
    assert "'stray'" in comparison.notes[0]


def test_models_without_a_schema_are_compared_by_name(both):
    for one in both:
        edit(one, lambda tensors: None, architectures=["MambaForCausalLM"], model_type="mamba")
    a, b = both
    assert compare(a, b).equal
    edit(b, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][::-1]}))
    (difference,) = compare(a, b).differences
    assert difference.name == "model.norm.weight"


def test_mistakes_in_models_without_a_schema(both):
    a, b = both
    for one in both:
        edit(one, lambda tensors: None, architectures=["MambaForCausalLM"], model_type="mamba")

    def change(tensors):
        before = dict(tensors)
        for name in before:
            if "layers." in name:
                number = int(name.split(".")[2])
                other = name.replace(f"layers.{number}.", f"layers.{(number + 1) % 4}.")
                tensors[name] = before[other]

    edit(b, change)
    (finding,) = compare(a, b).diagnoses
    assert finding.mistakes == ("layer-order",)


def test_tensors_of_no_size_of_one_element_and_of_integers(tmp_path):
    sides = []
    for name, step in (("a", 0), ("b", 1)):
        one = tmp_path / name
        one.mkdir()
        tensors = {
            "none": np.zeros((0, 64), np.float32),
            "scalar": np.array(1.0 + step, np.float32),
            "index": np.arange(64)[:: -1 if step else 1].astype(np.int32 if step else np.int64),
            "mask": np.array([True, False, bool(step)]),
        }
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, one / WEIGHTS
        )
        sides.append(one)
    comparison = compare(*sides)
    assert {one.name: one.kind for one in comparison.differences} == {
        "scalar": "different",
        "index": "recast",
        "mask": "different",
    }
    assert not any("index" in one.tensors for one in comparison.diagnoses)
    assert json.dumps(comparison.to_json())


class TestManifest:
    @pytest.fixture
    def written(self, both, run, tmp_path):
        def convert(*options):
            target = tmp_path / "written"
            code, _, err = run("convert", both[0], target, "--quiet", *options)
            assert code == 0, err
            (manifest,) = target.rglob("ckptx-manifest.json")
            return target, manifest

        return convert

    @pytest.mark.parametrize(
        "options",
        [
            ("--to", "hf", "--digest", "sha256"),
            ("--to", "core", "--tp", "2"),
            ("--to", "core", "--ckpt-format", "torch", "--pp", "2"),
            ("--to", "dcp"),
        ],
    )
    def test_whole_and_damaged(self, written, run, options):
        target, manifest = written(*options)
        code, out, err = run("verify", target, "--against-manifest", manifest)
        assert code == 0, err
        assert "equal to its manifest" in out
        entries = [
            (path, one)
            for path, file in json.loads(manifest.read_text())["files"].items()
            for one in file["tensors"]
        ]
        path, entry = entries[len(entries) // 2]
        with (manifest.parent / path).open("r+b") as file:
            file.seek(entry["offset"] + 1)
            byte = file.read(1)
            file.seek(entry["offset"] + 1)
            file.write(bytes([byte[0] ^ 1]))
        code, out, _ = run("verify", target, "--against-manifest", manifest, "--json")
        (damage,) = json.loads(out)["damages"]
        assert code == 1
        assert (damage["name"], damage["kind"]) == (entry["name"], "digest")

    def test_cut_and_missing_files(self, written, run):
        target, manifest = written("--to", "hf")
        with (target / WEIGHTS).open("r+b") as file:
            file.truncate(100)
        code, out, _ = run("verify", target, "--against-manifest", manifest)
        assert code == 1
        assert "size" in out
        (target / WEIGHTS).unlink()
        assert "missing" in run("verify", target, "--against-manifest", manifest)[1]

    @pytest.mark.parametrize("content", ["[]", "no json", '{"version": 9, "files": {}}'])
    def test_what_is_no_manifest(self, both, run, tmp_path, content):
        (tmp_path / "manifest").write_text(content)
        code, _, err = run("verify", both[0], "--against-manifest", tmp_path / "manifest")
        assert code == 1
        assert "manifest" in err

    def test_paths_stay_inside(self, both, run, tmp_path):
        content = {"version": 1, "files": {"../secret": {"bytes": 1, "tensors": []}}}
        (tmp_path / "manifest").write_text(json.dumps(content))
        code, _, err = run("verify", both[0], "--against-manifest", tmp_path / "manifest")
        assert code == 1
        assert "does not lie inside" in err


def test_names_of_megatron_are_explained(both):
    a, b = both

    def change(tensors):
        gate = "model.layers.0.mlp.gate_proj.weight"
        tensors[gate] = tensors[gate] + 1

    edit(b, change)
    lines = compare(a, b).render(200).splitlines()
    assert "names     mlp l0 weight W is the gate projection of a gated MLP" in lines


@pytest.mark.parametrize("width", [60, 80])
def test_large_numbers_fit(width):
    """Counts of a real layer, and ratios to values near zero."""
    entry = Difference(
        *("transformer layer 0: mlp l0 weight W", "different", "bfloat16 [256, 128]"),
        *("bfloat16 [256, 128]", 32_735, 32_768, 0.136, 7.97e03),
    )
    comparison = Comparison("a", "b", 31, 10, (entry,), ())
    assert max(map(len, comparison.render(width).splitlines())) <= width
