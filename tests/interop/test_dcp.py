"""FSDP: what `torch.distributed.checkpoint` saves is read, what is written it loads."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ckptx.containers import zstd
from ckptx.conversion import engine, supervisor
from ckptx.conversion.request import ConversionRequest
from ckptx.errors import CkptxError, ConversionError, FormatError
from ckptx.inspection.summary import inspect
from ckptx.inspection.values import look_up
from ckptx.registry import registry
from ckptx.registry.open import open_checkpoint
from ckptx.storage.gather import read
from ckptx.storage.source_file import SourceFile
from ckptx.verification.compare import compare
from tests.oracles import fsdp, hf, verl

from .conversion import contents, convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def base(source):
    return {"hf_base": source.directory}


@pytest.mark.parametrize(
    ("family", "world", "container"),
    [
        ("llama", 2, ()),
        ("qwen2-tied", 3, ("model",)),
        pytest.param("mistral", 4, ("app", "model"), marks=pytest.mark.full),
        pytest.param("qwen3", 2, ("fsdp_checkpoint", "model"), marks=pytest.mark.full),
    ],
)
def test_an_fsdp_checkpoint_becomes_the_model_it_was(family, world, container, source_of, tmp_path):
    source = source_of(family)
    fsdp.save(source.directory, tmp_path / "dcp", world, container)
    facts = convert(tmp_path / "dcp", tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert ("optimizer" in {drop["name"] for drop in facts.dropped}) == bool(container)


@pytest.mark.parametrize(
    ("family", "world", "shards", "container"),
    [
        ("llama", 2, 3, ()),
        ("qwen2-tied", 3, 1, ("app", "model")),
        pytest.param("qwen3", 4, 2, ("model",), marks=pytest.mark.full),
    ],
)
def test_an_fsdp_model_loads_what_is_written(family, world, shards, container, source_of, tmp_path):
    source = source_of(family)
    options = {"shards": shards, "target_container": ".".join(container)}
    convert(source.directory, tmp_path / "dcp", "dcp", **options)
    found = fsdp.load(tmp_path / "dcp", source.directory, world, container)
    expected = load_file(source.directory / "model.safetensors")
    tied = {"lm_head.weight"} if family == "qwen2-tied" else set()
    assert set(found) == set(expected) | tied
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_megatron_becomes_dcp_and_comes_back(source_of, tmp_path):
    source = source_of("qwen2")
    convert(source.directory, tmp_path / "core", "core", target_tensor_parallel_size=2)
    convert(tmp_path / "core", tmp_path / "dcp", "dcp", shards=2)
    convert(tmp_path / "dcp", tmp_path / "hf", "hf")
    assert contents(tmp_path / "hf") == contents(source.directory)


def test_names_that_wrappers_changed(tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2)
    state = load_file(tmp_path / "model" / "model.safetensors")
    wrapped = {
        "_orig_mod." + n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): t
        for n, t in state.items()
    }
    dcp.save(wrapped, checkpoint_id=str(tmp_path / "dcp"))
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", hf_base=tmp_path / "model")
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")


def test_two_models_in_one_checkpoint_must_be_told_apart(tmp_path):
    hf.llama(tmp_path / "model", num_hidden_layers=2)
    state = load_file(tmp_path / "model" / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in state.items()}
    dcp.save({"actor": state, "critic": other}, checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(FormatError, match="found 'actor', 'critic'; say which"):
        convert(tmp_path / "dcp", tmp_path / "hf", "hf", hf_base=tmp_path / "model")
    chosen = {"loader_options": {"container": "actor"}, "hf_base": tmp_path / "model"}
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", **chosen)
    assert contents(tmp_path / "hf") == contents(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "world"),
    [("mixtral", 2), pytest.param("qwen3_moe", 3, marks=pytest.mark.full)],
)
def test_experts_that_memory_has_fused(family, world, source_of, tmp_path):
    source = source_of(family)
    fsdp.save(source.directory, tmp_path / "dcp", world)
    facts = convert(tmp_path / "dcp", tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert "names of transformers 5 in memory" in " ".join(facts.notes)

    facts = convert(source.directory, tmp_path / "back", "dcp", shards=2)
    assert "--target-names files" in " ".join(facts.notes)
    found = fsdp.load(tmp_path / "back", source.directory, world)
    model = AutoModelForCausalLM.from_pretrained(source.directory, local_files_only=True)
    expected = model.state_dict()
    assert set(found) == set(expected)
    assert "model.layers.0.mlp.experts.gate_up_proj" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    verl.save(source.directory, tmp_path / "actor", world)
    facts = convert(tmp_path / "actor", tmp_path / "from-verl", "hf")
    assert contents(tmp_path / "from-verl") == contents(source.directory)
    assert "names of transformers 5 in memory" in " ".join(facts.notes)

    convert(source.directory, tmp_path / "files", "dcp", target_names="files")
    state = {name: torch.empty_like(t) for name, t in source_weights(source.directory).items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "files"))
    for name, tensor in source_weights(source.directory).items():
        assert torch.equal(state[name], tensor)


def source_weights(directory):
    return load_file(directory / "model.safetensors")


def tiny(architecture: str, directory, **settings):
    """A random model of an architecture that no schema of ckptx has."""
    cls = getattr(transformers, architecture)
    text = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = cls(cls.config_class(**(settings or text))).float()
    model.save_pretrained(directory)
    return model


VISION = {
    "text_config": {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "embed_dim": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("Qwen2_5_VLForConditionalGeneration", VISION), ("GraniteMoeForCausalLM", {})],
)
@pytest.mark.parametrize("format", ["dcp", "pytorch"])
def test_models_that_pass_through_get_the_names_of_files(architecture, settings, format, tmp_path):
    model = tiny(architecture, tmp_path / "model", **settings)
    state = model.state_dict()
    source = tmp_path / ("source" if format == "dcp" else "source.pt")
    if format == "dcp":
        dcp.save(state, checkpoint_id=str(source))
    else:
        torch.save(state, source)
    facts = convert(source, tmp_path / "hf", "hf", hf_base=tmp_path / "model")
    assert "given those of its files" in " ".join(facts.notes)
    expected, found = source_weights(tmp_path / "model"), source_weights(tmp_path / "hf")
    # A tied state dict has both names; nothing says of an unknown model that they are one.
    assert set(found) - set(expected) <= {"lm_head.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    convert(tmp_path / "model", tmp_path / "back", "dcp")
    saved = dcp.FileSystemReader(tmp_path / "back").read_metadata().state_dict_metadata
    assert set(state) - set(saved) <= {"lm_head.weight"}
    loaded = {name: torch.full_like(state[name], torch.nan) for name in saved}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "back"))
    assert all(torch.equal(loaded[name], state[name]) for name in saved)


@pytest.mark.parametrize(("family", "world"), [("llama", 2), ("mixtral", 3)])
def test_shards_of_safetensors(family, world, source_of, tmp_path):
    source = source_of(family)
    shards = tmp_path / "shards"
    fsdp.save_safetensors(source.directory, shards, world)
    assert len(list(shards.iterdir())) == world
    facts = convert(shards, tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)
    assert f"{world} shards were found" in " ".join(facts.notes)

    shutil.copy(source.directory / "config.json", shards)
    assert registry.detect(shards) == "dcp"
    first, *_ = sorted(shards.glob("shard-*"))
    first.unlink()
    with pytest.raises(FormatError, match="a shard is missing"):
        convert(shards, tmp_path / "refused", "hf")


def test_shards_and_what_torch_made_of_them(source_of, tmp_path):
    source = source_of("llama")
    fsdp.save_safetensors(source.directory, tmp_path / "saved", 2, consolidate=True)
    for directory in (tmp_path / "saved", tmp_path / "saved" / "sharded"):
        target = tmp_path / f"from-{directory.name}"
        convert(directory, target, "hf", **base(source))
        assert contents(target) == contents(source.directory)


def test_shards_that_say_no_offsets(tmp_path):
    name = "shard-00001-model-00001-of-00001.safetensors"
    (tmp_path / "shards").mkdir()
    for metadata, said in (
        (None, "expected DCP_SHARDING_INFO"),
        ({"DCP_SHARDING_INFO": "[" * 9}, "expected DCP_SHARDING_INFO"),
        ({"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [-1, 0]}}'}, "found saved_offsets"),
        ({"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0]}}'}, "found saved_offsets"),
        ({"DCP_SHARDING_INFO": "{}"}, "found saved_offsets None"),
    ):
        save_file({"a": torch.zeros(2, 3)}, tmp_path / "shards" / name, metadata=metadata)
        with pytest.raises(FormatError, match=said):
            convert(tmp_path / "shards", tmp_path / "hf", "hf")


def test_fsdp_is_a_name_for_both_kinds_of_checkpoint(source_of, tmp_path):
    source = source_of("llama")
    fsdp.save(source.directory, tmp_path / "dcp", 2)
    verl.save(source.directory, tmp_path / "actor", 2)
    for name in ("dcp", "actor"):
        convert(tmp_path / name, tmp_path / f"hf-{name}", "hf", loader="fsdp", **base(source))
        assert contents(tmp_path / f"hf-{name}") == contents(source.directory)
    convert(source.directory, tmp_path / "written", "fsdp")
    assert registry.detect(tmp_path / "written") == "dcp"
    with pytest.raises(FormatError, match="is neither dcp nor verl"):
        convert(source.directory, tmp_path / "none", "hf", loader="fsdp")


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ("checkpoint-7/pytorch_model_fsdp_0", ("model",)),  # accelerate, the Trainer
        ("global_step7/actor/dcp_checkpoint", ("fsdp_checkpoint", "model")),  # RLinf
        ("_actor/global_step7", ()),  # LightRFT
        ("app", ("app", "model")),  # PyTorch's tutorial
    ],
)
@pytest.mark.parametrize("from_above", [False, True])
def test_where_frameworks_put_a_model(place, prefix, from_above, source_of, tmp_path):
    source = source_of("qwen2-tied")
    directory = tmp_path / place
    state = AutoModelForCausalLM.from_pretrained(source.directory).state_dict()
    for word in reversed(prefix):
        state = {word: state}
    dcp.save(state, checkpoint_id=str(directory))
    given = directory
    if from_above and "fsdp_0" in place:
        given = directory.parent
        moments = {"optimizer": {"state": {"a.exp_avg": torch.zeros(3)}}}
        dcp.save(moments, checkpoint_id=str(given / "optimizer_0"))
        torch.save({"last_epoch": 1}, given / "scheduler.pt")
    assert registry.detect(given) == "dcp"
    facts = convert(given, tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)
    if from_above and "fsdp_0" in place:
        assert {"optimizer_0", "scheduler.pt"} <= {drop["name"] for drop in facts.dropped}


@pytest.mark.parametrize(
    ("how", "world"),
    [("fsdp x tp", 4), ("ddp x fsdp", 2), ("columns", 4)],
)
def test_boxes_and_copies(how, world, source_of, tmp_path):
    source = source_of("llama")
    fsdp.save_sharded(source.directory, tmp_path / "dcp", world, how)
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)


def test_tensors_that_are_stored_transposed(source_of, tmp_path):
    source = source_of("llama")
    weights = source_weights(source.directory)
    turned = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in weights.items()}
    assert not turned["model.embed_tokens.weight"].is_contiguous()
    dcp.save(turned, checkpoint_id=str(tmp_path / "dcp"))
    convert(tmp_path / "dcp", tmp_path / "hf", "hf", **base(source))
    assert contents(tmp_path / "hf") == contents(source.directory)


def compressed(source, directory, weights=None):
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")
    if not extension.ZStandard.is_available():
        pytest.skip("zstandard is not installed")
    writer = dcp.FileSystemWriter(str(directory), _extensions=[extension.ZStandard()])
    weights = weights or source_weights(source.directory)
    dcp.save({"model": weights, "step": 3}, storage_writer=writer)
    return directory


def test_items_that_are_compressed(source_of, tmp_path):
    source = source_of("llama")
    compressed(source, tmp_path / "dcp")
    job = ConversionRequest(
        "dcp", "hf", tmp_path / "dcp", tmp_path / "hf", hf_base=source.directory
    )
    supervisor.convert(job)
    assert contents(tmp_path / "hf") == contents(source.directory)


@pytest.fixture
def decodings(monkeypatch):
    """The bytes at which items were decoded, in order."""
    places, real = [], zstd.decoded

    def counted(file, offset, length, limit):
        places.append(offset)
        return real(file, offset, length, limit)

    monkeypatch.setattr("ckptx.containers.dcp.decoded", counted)
    return places


def test_compressed_items_are_decoded_when_they_are_read(source_of, tmp_path, decodings):
    source = source_of("llama")
    weights = source_weights(source.directory)
    turned = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in weights.items()}
    compressed(source, tmp_path / "dcp", turned)
    with open_checkpoint(tmp_path / "dcp", options={"hf_base": source.directory}) as checkpoint:
        names, tensors = checkpoint.tensors()
        assert names == "huggingface"
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in weights.items()}
        assert all(Path(file).parent == tmp_path / "dcp" for file in checkpoint.begin.files)
        assert not decodings
        name = "model.layers.0.self_attn.k_proj.weight"
        for _ in range(2):
            with closing(checkpoint.files()) as files:
                assert read(tensors[name], files).tolist() == weights[name].float().tolist()
            assert len(decodings) == 1
    with pytest.raises(ConversionError, match="the checkpoint is closed"):
        read(tensors["lm_head.weight"], checkpoint.begin.files)
    assert inspect(tmp_path / "dcp").healthy
    assert len(decodings) == 1
    assert compare(source.directory, tmp_path / "dcp").equal
    assert len(decodings) == 1 + len(weights)


def test_a_plan_decodes_nothing_and_tells_the_room_it_takes(source_of, tmp_path, decodings):
    source = source_of("llama")
    compressed(source, tmp_path / "dcp")
    plan = engine.forecast(
        ConversionRequest("dcp", "hf", tmp_path / "dcp", tmp_path / "hf", hf_base=source.directory)
    )
    size = sum(tensor.nbytes for tensor in source_weights(source.directory).values())
    assert size <= plan.spool <= size + 64 * len(plan.tensors)
    assert not decodings


def test_a_damaged_compressed_item_hides_no_other(source_of, tmp_path):
    source = source_of("llama")
    compressed(source, tmp_path / "dcp")
    damage(tmp_path / "dcp")
    assert inspect(tmp_path / "dcp").healthy
    with pytest.raises(CkptxError, match="is no whole zstd stream"):
        look_up(tmp_path / "dcp", "model.norm.weight")


def damage(directory):
    """Overwrite the first bytes of every stream of zstd."""
    for file in directory.glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(bytes.fromhex("28b52ffd"), bytes(4)))


def test_a_compressed_item_that_is_damaged(source_of, tmp_path):
    source = source_of("llama")
    compressed(source, tmp_path / "dcp")
    damage(tmp_path / "dcp")
    job = ConversionRequest(
        "dcp", "hf", tmp_path / "dcp", tmp_path / "hf", hf_base=source.directory
    )
    with pytest.raises(CkptxError, match="is no whole zstd stream"):
        supervisor.convert(job)
    assert not (tmp_path / "hf").exists()


def test_compression_without_its_library_or_of_an_unknown_kind(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with SourceFile(path) as file, pytest.raises(FormatError, match="pip install zstandard"):
        list(zstd.decoded(file, 0, 4, 100))
    assert zstd.is_zstd(("stream.zstd/1",))
    assert not zstd.is_zstd(("stream.zstd/2",))
    assert not zstd.is_zstd(("stream.aes/1",))
    assert not zstd.is_zstd(("stream.zstd/1", "stream.zstd/1"))


def test_a_tied_model_without_a_schema_loads_into_its_class(tmp_path):
    hf.granite(tmp_path / "hf", num_hidden_layers=2, tie_word_embeddings=True)
    convert(tmp_path / "hf", tmp_path / "dcp", "dcp")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=str(tmp_path / "dcp"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    convert(tmp_path / "dcp", tmp_path / "back", "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
