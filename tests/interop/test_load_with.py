"""What reports say that loads a target: Megatron's own parser takes it, and it is about the target.

Its meaning is that of NVIDIA/Megatron-LM megatron/training/checkpointing.py @ core_v0.19.2: the
tracker file says which iteration, unless --ckpt-step does (load_checkpoint); a state of the
optimizer that is not there stops it, unless the iteration is a release.
"""

from __future__ import annotations

import json
import shlex

import pytest

import ckptx
from ckptx.schemas.megatron_settings.settings import TABLE
from tests.oracles import mcore_flags
from tests.oracles.mcore_versions import NEWEST, place
from tests.record.sources import FAMILIES, _family

PLAIN = sorted(name for name in json.loads(FAMILIES.read_text()) if not name.startswith("llava"))
LATER = 7


def said(target, to="core", source="llama", **options):
    """The load hint of a conversion, and its notes."""
    here = target.parent / f"source-{source}"
    if not here.exists():
        _family(source)(here)
    report = ckptx.convert(here, target, to=to, **options)
    return report.facts.load_hint, report.notes


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The load hint for every family that Megatron holds, by family and format."""
    found = {}
    for name in PLAIN:
        source = _family(name)(tmp_path_factory.mktemp("hint") / name)
        for to, options in (
            ("core", {"iteration": LATER, "pp": 2}),
            ("core", {"saver_transformer_impl": "local", "ckpt_format": "torch"}),
            ("legacy", {}),
        ):
            try:
                plan = ckptx.plan(source, source.parent / "out", to=to, **options)
            except ckptx.CkptxError:
                continue  # not in this form
            found[f"{name} {to} {options}"] = plan.facts.load_hint
    return found


@pytest.mark.skipif(place(NEWEST) is None, reason=f"no megatron-core {NEWEST} here")
def test_megatron_s_parser_takes_every_flag(commands):
    lines = {name: shlex.split(text)[1:] for name, text in commands.items() if " core " in name}
    assert len({name.split()[0] for name in lines}) == 19
    found = mcore_flags.left_over([*lines.values()], NEWEST)
    assert dict(zip(lines, found, strict=True)) == {name: [] for name in lines}


def test_releases_with_legacy_models_have_every_flag(commands):
    rows = [line.split("\t") for line in TABLE.read_text().splitlines()[1:]]
    known = {row[0] for row in rows if "argument" in row[3]}
    lines = [shlex.split(text)[1:] for name, text in commands.items() if " legacy " in name]
    assert lines
    for flag in {word for line in lines for word in line if word.startswith("--")}:
        name = flag.removeprefix("--").replace("-", "_")
        assert name in known or name.replace("no_", "", 1) in known, flag


@pytest.mark.parametrize("to", ["core", "legacy"])
def test_an_iteration_that_the_tracker_does_not_name(to, tmp_path):
    hint, notes = said(tmp_path / "root", to, iteration=10)
    assert "--ckpt-step" not in hint
    planned = ckptx.plan(tmp_path / "source-llama", tmp_path / "root", to=to, iteration=20)
    hint, notes = said(tmp_path / "root", to, iteration=20)
    assert (tmp_path / "root/latest_checkpointed_iteration.txt").read_text() == "10"
    assert hint == planned.facts.load_hint
    words = shlex.split(hint)
    assert words[words.index("--ckpt-step") + 1] == "20"
    assert any("stays as it is (10)" in note for note in notes)


def test_a_release_that_the_tracker_does_not_name_has_no_command(tmp_path):
    said(tmp_path / "root", iteration=10)
    hint, notes = said(tmp_path / "root")
    assert hint == ""
    assert any("--overwrite moves it, without which nothing loads" in note for note in notes)
    hint, _ = said(tmp_path / "root", overwrite=True)
    assert "--ckpt-step" not in hint
    assert (tmp_path / "root/latest_checkpointed_iteration.txt").read_text() == "release"


def test_an_iteration_has_no_training_state_and_a_release_needs_none(tmp_path):
    hint, _ = said(tmp_path / "root", iteration=10)
    assert "--no-load-optim --no-load-rng" in hint
    hint, _ = said(tmp_path / "another")
    assert "--no-load" not in hint


def test_the_tokenizer_that_lies_there_is_named(tmp_path):
    hint, _ = said(tmp_path / "root")
    words = shlex.split(hint)
    folder = words[words.index("--tokenizer-model") + 1]
    assert "--no-use-tokenizer-model-from-checkpoint-args" in words
    assert folder == f"{tmp_path / 'root'}/release/huggingface"
    assert (tmp_path / "root/release/huggingface/tokenizer.json").exists()
    (tmp_path / "source-llama/tokenizer.json").unlink()
    hint, _ = said(tmp_path / "bare")
    assert "--no-use-tokenizer-model-from-checkpoint-args" in hint
    assert "--tokenizer" not in hint
    hint, _ = said(tmp_path / "named", tokenizer_model="/my/tokenizer")
    assert "-tokenizer-" not in hint


@pytest.mark.parametrize(
    ("source", "to", "options", "words"),
    [
        ("qwen2-tied", "core", {}, "untie_embeddings_and_output_weights True, here False"),
        ("llama", "core", {"ckpt_format": "torch"}, "torch_dist, here core --ckpt-format torch"),
        ("llama", "legacy", {}, "here legacy"),
    ],
)
def test_a_root_keeps_one_model_in_one_form(source, to, options, words, tmp_path):
    root = tmp_path / "root"
    said(root, iteration=10)
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.raises(ckptx.CkptxError) as error:
        said(root, to, source, iteration=20, **options)
    assert words in str(error.value)
    assert "--overwrite" in str(error.value)
    assert sorted(path.name for path in root.rglob("*")) == before
    hint, _ = said(root, to, source, iteration=20, overwrite=True, **options)
    assert hint
    assert (root / "iter_0000010").is_dir()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["LlamaForTokenClassification"]}, "AutoModelForTokenClassification"),
        ({"architectures": []}, "AutoModelForCausalLM"),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModel": "modeling_mine.Mine"}},
            'AutoModel.from_pretrained("PLACE", trust_remote_code=True)',
        ),
    ],
)
def test_transformers_loads_the_class_of_the_config(changes, words, tmp_path):
    source = _family("llama")(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "unknown_to_all", **changes}
    (source / "config.json").write_text(json.dumps(config))
    report = ckptx.convert(source, tmp_path / "out", to="hf")
    assert words.replace("PLACE", str(tmp_path / "out")) in report.facts.load_hint
