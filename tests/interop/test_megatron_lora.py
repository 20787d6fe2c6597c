"""LoRA inside Megatron's checkpoints: merged, it is bit for bit what peft merges."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ckptx.errors import CkptxError
from tests.oracles import hf

from .conversion import convert

adapters = pytest.importorskip("tests.oracles.adapters", reason="peft is not installed")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS, RANK, ALPHA = 2, 4, 12
BRIDGE = (".adapter.linear_in.weight", ".adapter.linear_out.weight")
SWIFT = (".lora_A.default.weight", ".lora_B.default.weight")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return base, adapter, and what peft merges; fused layers have one A, as in Megatron."""
    root = tmp_path_factory.mktemp("trained")
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": GROUPS}
    hf.llama(root / "base", **sizes)
    adapters.make(root / "base", root / "lora", target_modules=EVERY, r=RANK, lora_alpha=ALPHA)
    file = root / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        for own, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            if f"{own}.lora_A" in name:
                tensors[name] = tensors[name.replace(own, first)].clone()
    save_file(tensors, file, {"format": "pt"})
    expected = adapters.merged(root / "base", [root / "lora"], root / "peft")
    return root / "base", tensors, expected


def matrices(tensors, layer, names, tp=1, tp_rank=0, cut=True):
    """Return what one rank holds of a layer's matrices, cut by hand as the frameworks cut them."""

    def b(module):
        return tensors[f"base_model.model.model.layers.{layer}.{module}.lora_B.weight"]

    def a(module):
        return tensors[f"base_model.model.model.layers.{layer}.{module}.lora_A.weight"]

    def part(tensor, axis):
        return tensor.chunk(tp, axis)[tp_rank].clone()

    groups = [b(f"self_attn.{one}_proj").reshape(GROUPS, -1, RANK) for one in "qkv"]
    qkv = torch.cat(groups, 1).reshape(-1, RANK)
    fc1 = torch.cat([part(b(f"mlp.{one}_proj"), 0) for one in ("gate", "up")])
    by_rows = {
        "self_attention.linear_qkv": (a("self_attn.q_proj"), part(qkv, 0)),
        "mlp.linear_fc1": (a("mlp.gate_proj"), fc1),
    }
    by_columns = {
        "self_attention.linear_proj": (a("self_attn.o_proj"), b("self_attn.o_proj")),
        "mlp.linear_fc2": (a("mlp.down_proj"), b("mlp.down_proj")),
    }
    found = {}
    for module, (right, left) in by_rows.items():
        found[module + names[0]] = part(right, 0) if cut else right
        found[module + names[1]] = left
    for module, (right, left) in by_columns.items():
        found[module + names[0]] = part(right, 1)
        found[module + names[1]] = part(left, 0) if cut else left
    return found


def wrapped(model):
    """Return a state dict with ms-swift's names of the layers that have adapters."""
    modules = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.")
    found = {}
    for name, tensor in model.items():
        module = next((one for one in modules if one in name), None)
        found[name.replace(module, f"{module}base_layer.") if module else name] = tensor
    return found


def save(base, trained, target, writer, tp=2, pp=1, alone=False):
    """Write the base as rank files, and the adapter into them."""
    sizes = {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp}
    convert(base, target, "core", ckpt_format="torch", **sizes)
    for file in sorted(target.glob("*/mp_rank_*/model_optim_rng.pt")):
        tp_rank, pp_rank = map(int, (*file.parent.name.split("_")[2:], "0")[:2])
        state = torch.load(file, weights_only=False)
        model = {} if alone else dict(state["model"])
        if writer == "swift":
            model = wrapped(model)
            state["args"].lora_alpha, state["args"].lora_rank = ALPHA, RANK
        names = SWIFT if writer == "swift" else BRIDGE
        for layer in range(2 // pp):
            own = matrices(trained, layer + pp_rank * 2 // pp, names, tp, tp_rank, names is BRIDGE)
            model |= {f"decoder.layers.{layer}.{name}": one for name, one in own.items()}
        torch.save({**state, "model": model}, file)


def distributed(base, trained, target):
    """Write the base as torch_dist, with layers stacked, and the adapter into it."""
    convert(base, target, "core")
    (place,) = target.glob("*/metadata.json")
    reader = dcp.FileSystemReader(place.parent)
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in reader.read_metadata().state_dict_metadata.items()
        if hasattr(one, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    layers = [matrices(trained, layer, BRIDGE) for layer in range(2)]
    for name in layers[0]:
        tensors[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
    new = target / "new"
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(new), no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(place.parent / name, new)
    shutil.rmtree(place.parent)
    new.rename(place.parent)


def check(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("writer", "tp", "pp"), [("bridge", 1, 1), ("bridge", 2, 2), ("swift", 2, 1)]
)
def test_an_adapter_in_rank_files_is_merged_as_peft_does(writer, tp, pp, trained, tmp_path):
    base, tensors, expected = trained
    save(base, tensors, tmp_path / "core", writer, tp, pp)
    alpha = {"loader_options": {"lora_alpha": ALPHA}} if writer == "bridge" else {}
    if alpha:
        with pytest.raises(CkptxError, match=r"lora_alpha is None, .*; give --lora-alpha"):
            convert(tmp_path / "core", tmp_path / "refused", "hf")
    convert(tmp_path / "core", tmp_path / "hf", "hf", **alpha)
    check(hf.weights(tmp_path / "hf"), expected)
    convert(tmp_path / "core", tmp_path / "peft", "peft", **alpha)
    check(load_file(tmp_path / "peft" / "adapter_model.safetensors"), tensors)
    convert(tmp_path / "peft", tmp_path / "again", "hf", hf_base=base)
    check(hf.weights(tmp_path / "again"), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_adapter_in_torch_dist_takes_its_alpha_from_the_run(trained, tmp_path):
    base, tensors, expected = trained
    distributed(base, tensors, tmp_path / "core")
    (place,) = tmp_path.glob("core/*/metadata.json")
    (place.parent / "run_config.yaml").write_text(f"peft:\n  alpha: {ALPHA}\n  dim: {RANK}\n")
    convert(tmp_path / "core", tmp_path / "hf", "hf")
    check(hf.weights(tmp_path / "hf"), expected)
    (place.parent / "run_config.yaml").write_text(f"peft:\n  alpha: {ALPHA}\n  dim: 8\n")
    with pytest.raises(CkptxError, match=r"run_config.yaml: says rank 8 .* have rank 4"):
        convert(tmp_path / "core", tmp_path / "refused", "hf")
    for text, says in (
        ("a: &a {b: [*a, *a]}\n", "its references say more than"),
        ("peft: [1]\n", "expected a mapping, and one at 'peft'"),
        ("[" * 100_000, "nested too deeply"),
        ("# \n" * (2 << 20), "expected at most 4194304 bytes"),
    ):
        (place.parent / "run_config.yaml").write_text(text)
        with pytest.raises(CkptxError, match=rf"run_config.yaml: .*{says}"):
            convert(tmp_path / "core", tmp_path / "refused", "hf")


def test_a_merge_from_megatron_is_cast_as_a_whole(trained, tmp_path):
    base, tensors, expected = trained
    save(base, tensors, tmp_path / "core", "swift")
    convert(tmp_path / "core", tmp_path / "hf", "hf", dtype="bf16")
    check(hf.weights(tmp_path / "hf"), {key: one.bfloat16() for key, one in expected.items()})


def test_an_adapter_alone_is_exported_and_merged_into_its_base(trained, tmp_path):
    base, tensors, expected = trained
    save(base, tensors, tmp_path / "core", "bridge", alone=True)
    with pytest.raises(CkptxError, match=r"a LoRA adapter alone, .*--to peft"):
        convert(tmp_path / "core", tmp_path / "refused", "hf")
    alpha = {"loader_options": {"lora_alpha": ALPHA}}
    convert(tmp_path / "core", tmp_path / "peft", "peft", **alpha)
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["task_type"]) == (RANK, ALPHA, "CAUSAL_LM")
    check(adapters.merged(base, [tmp_path / "peft"], tmp_path / "merged"), expected)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.linear_fc2.adapter.weight_magnitude",
        "self_attention.linear_qkv.adapter.adapter_q.linear_in.weight",
        "mlp.experts.linear_fc1.adapter.linear_in.weight",
        "mlp.linear_fc2.lora_magnitude_vector.default.weight",
    ],
)
def test_other_adapters_are_refused_by_name(name, trained, tmp_path):
    base, tensors, _ = trained
    save(base, tensors, tmp_path / "core", "bridge", tp=1)
    (file,) = tmp_path.glob("core/*/mp_rank_00/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    state["model"][f"decoder.layers.0.{name}"] = torch.ones(4, 8)
    torch.save(state, file)
    with pytest.raises(CkptxError, match=f"of a kind that is not merged here .*{name}"):
        convert(tmp_path / "core", tmp_path / "hf", "hf", loader_options={"lora_alpha": 1})
    shutil.rmtree(tmp_path / "core")
    convert(base, tmp_path / "core", "core")
    with pytest.raises(CkptxError, match=r"--lora-alpha: .* holds no LoRA weights"):
        convert(tmp_path / "core", tmp_path / "hf", "hf", loader_options={"lora_alpha": 1})
