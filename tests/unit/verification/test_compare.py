"""What ``ckptx verify`` compares, how it pairs tensors, and what it says."""

from __future__ import annotations

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptx.errors import FormatError
from ckptx.verification.compare import Comparison, Difference, compare
from ckptx.verification.difference import Tolerance
from ckptx.verification.manifest_check import check

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


def test_settings_that_differ_are_told(both):
    edit(both[1], lambda tensors: None, rope_theta=5e5, rms_norm_eps=1e-6)
    result = compare(*both)
    assert result.equal
    assert [note.partition("settings: ")[2] for note in result.notes] == [
        "norm_epsilon of the language model is 1e-05 in A and 1e-06 in B",
        "rotary_base of the language model is 10000.0 in A and 500000.0 in B",
    ]


def test_what_is_not_compared_is_told(both):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(both[1], lambda tensors: tensors.update({name: np.ones(2, "f4")}))
    (note,) = compare(*both).notes
    assert note == f"B: not compared: {name!r}: no weights: the model makes it anew"


def stored_pair(tmp_path, first, second):
    """Return the comparison of two tensors of no known model."""
    for side, tensor in zip("ab", (first, second), strict=True):
        (tmp_path / side).mkdir()
        save_file({"x": tensor, "same": np.ones(3, "f4")}, tmp_path / side / WEIGHTS)
    return compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("shapes", [((0, 4), (0, 5)), ((4, 0), (0, 4)), ((0, 4), (6, 4))])
def test_shapes_of_no_elements(tmp_path, shapes):
    (found,) = stored_pair(tmp_path, *(np.zeros(shape, "f4") for shape in shapes)).differences
    assert found.kind == "reshaped"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.array([1, 0.0], "f4"), np.array([1, -0.0], "f4")),
        (np.array([True, False]), np.array([True, True])),
        (np.array([3, 0], "i8"), np.array([3, 4], "i8")),
    ],
    ids=["signed zeros", "flags", "indices"],
)
def test_nothing_is_claimed_of_what_was_filled_alike(tmp_path, first, second):
    result = stored_pair(tmp_path, first, second)
    assert not result.equal
    assert not result.diagnoses


def test_the_distance_of_the_largest_bfloat16(tmp_path):
    large = np.array([3e38, 1], "f4").astype(ml_dtypes.bfloat16)
    save_file({"x": large}, tmp_path / "a.safetensors")
    save_file({"x": -large}, tmp_path / "b.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    (found,) = compare(*paths).differences
    assert found.max_abs == 2 * float(large[0])
    assert found.max_rel == 2
    assert compare(*paths, tolerance=Tolerance(rtol=2)).equal
    assert not compare(*paths, tolerance=Tolerance(rtol=1.9)).equal


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

    @pytest.mark.parametrize(
        "options",
        [
            ("--to", "hf", "--max-shard-size", "20KB", "--digest", "sha256"),
            ("--to", "hf", "--weight-files", "bin"),
            ("--to", "core", "--tp", "2"),
        ],
    )
    def test_every_byte_counts(self, written, options):
        target, manifest = written(*options)
        assert check(target, manifest).equal
        entries = json.loads(manifest.read_text())["files"]
        for path in (path for path in target.rglob("*") if path.is_file() and path != manifest):
            if path.name == "latest_checkpointed_iteration.txt":
                continue  # outside of the iteration that the manifest is about
            content = path.read_bytes()
            tensors = entries[str(path.relative_to(manifest.parent))]["tensors"]
            ends = [tensor["offset"] - 1 for tensor in tensors]
            for place in {0, len(content) // 2, len(content) - 1, *ends[:3], *ends[-2:]}:
                changed = bytearray(content)
                changed[place] ^= 1
                path.write_bytes(changed)
                result = check(target, manifest)
                assert not result.equal, (path, place)
                assert [one.file for one in result.damages] == [
                    str(path.relative_to(manifest.parent))
                ]
            path.write_bytes(content)

    def test_names_that_changed_places_are_damage(self, written):
        target, manifest = written("--to", "hf")
        gate, up = b"layers.0.mlp.gate_proj", b"layers.0.mlp.up_proj"
        content = (target / WEIGHTS).read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        head = content[8:size].replace(gate, b"\0").replace(up, gate).replace(b"\0", up)
        assert head != content[8:size]
        (target / WEIGHTS).write_bytes(content[:8] + head + content[size:])
        (damage,) = check(target, manifest).damages
        assert (damage.file, damage.name, damage.kind) == (WEIGHTS, "", "digest")
        assert "besides tensors" in damage.detail

    def test_a_file_under_another_name_is_the_one_that_is_checked(self, both, run, tmp_path):
        code, _, err = run("convert", both[0], tmp_path / "model.pt", "--to", "pytorch", "-q")
        assert code == 0, err
        manifest = tmp_path / "model.pt.ckptx-manifest.json"
        content = bytearray((tmp_path / "model.pt").read_bytes())
        (tmp_path / "copy.pt").write_bytes(content)
        assert check(tmp_path / "copy.pt", manifest).equal
        content[len(content) // 2] ^= 1
        (tmp_path / "copy.pt").write_bytes(content)
        assert not check(tmp_path / "copy.pt", manifest).equal

    def test_a_copy_below_is_not_taken_for_what_is_damaged(self, written):
        target, manifest = written("--to", "hf")
        shutil.copytree(target, target / "backup")
        (target / "config.json").unlink()
        assert not check(target, manifest).equal

    def test_manifests_without_digests_of_the_rest_are_read(self, written):
        target, manifest = written("--to", "hf")
        content = json.loads(manifest.read_text())
        for file in content["files"].values():
            del file["rest"]
        manifest.write_text(json.dumps(content))
        assert check(target, manifest).equal

    def test_entries_that_make_no_sense(self, written):
        target, manifest = written("--to", "hf")
        content = json.loads(manifest.read_text())
        for change in (
            {"offset": -5},
            {"offset": 1 << 70},
            {"offset": 1.5},
            {"shape": "a"},
            {"shape": 5},
            {"shape": [-1]},
            {"shape": [16.0, 2]},
            {"shape": [1 << 62]},
            {"dtype": []},
            {"dtype": "float3"},
            {"digest": "crc:1"},
        ):
            wrong = json.loads(json.dumps(content))
            wrong["files"][WEIGHTS]["tensors"][0] |= change
            manifest.write_text(json.dumps(wrong))
            with pytest.raises(FormatError, match=re.escape(WEIGHTS)):
                check(target, manifest)

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
