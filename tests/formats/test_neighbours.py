"""What lies beside weights in Megatron's checkpoints, and what is no checkpoint of ours."""

from __future__ import annotations

import enum
import shutil
import sys
import types

import pytest
import torch

from ckptx.errors import CkptxError, FormatError
from ckptx.registry import registry
from tests.interop.conversion import convert
from tests.oracles import hf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("neighbours")
    hf.llama(root / "hf", num_hidden_layers=1)
    convert(root / "hf", root / "core", "core", ckpt_format="torch")
    return root


def changed(made, target, args=None, **weights):
    """Copy the rank's file with other weights and args; return its directory."""
    shutil.copytree(made / "core", target)
    (file,) = target.glob("*/mp_rank_00/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    state["model"] |= {name.replace("__", "."): one for name, one in weights.items()}
    for name, value in (args or {}).items():
        setattr(state["args"], name, value)
    torch.save(state, file)
    return target


def module_of(name):
    """Return a module that can be pickled by name while the test runs."""
    found = types.ModuleType(name)
    sys.modules[name] = found
    return found


@pytest.fixture
def foreign():
    """Modules that are there while a pickle is written, and gone when it is read."""
    known = set(sys.modules)
    yield module_of
    for name in set(sys.modules) - known:
        if name.startswith(("swift", "transformer_engine")):
            del sys.modules[name]


def declared(cls, module):
    cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
    setattr(module, cls.__name__, cls)


def equal(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_objects_of_absent_packages_in_args_are_inert(made, foreign, tmp_path):
    swift = foreign("swift.megatron.arguments")
    for parent in ("swift", "swift.megatron"):
        foreign(parent)

    class GPTBridge:
        def __init__(self):
            self.cache = {"layers": [1, 2], "dtype": torch.bfloat16}

    class TaskType(enum.Enum):
        CAUSAL_LM = "causal_lm"

    class Arguments:
        def __init__(self, known):
            self.__dict__.update(known)

    for cls in (GPTBridge, TaskType, Arguments):
        declared(cls, swift)
    objects = {"bridge_obj": GPTBridge(), "task_type": TaskType.CAUSAL_LM}
    changed(made, tmp_path / "objects", objects)
    changed(made, tmp_path / "whole", objects)
    (file,) = (tmp_path / "whole").glob("*/mp_rank_00/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    torch.save({**state, "args": Arguments(vars(state["args"]))}, file)
    for name in [name for name in sys.modules if name.startswith("swift")]:
        del sys.modules[name]
    for name in ("objects", "whole"):
        facts = convert(tmp_path / name, tmp_path / f"{name}-hf", "hf")
        assert equal(hf.weights(tmp_path / f"{name}-hf"), hf.weights(made / "hf"))
        assert any("'bridge_obj', 'task_type'" in note for note in facts.notes)
    assert not any(name.startswith("swift") for name in sys.modules)


def test_quantised_weights_of_transformer_engine_are_named(made, foreign, tmp_path):
    module = foreign("transformer_engine.pytorch.tensor.float8_tensor")
    for parent in ("transformer_engine", "transformer_engine.pytorch.tensor"):
        foreign(parent)
    foreign("transformer_engine.pytorch")

    class Float8Tensor:
        @classmethod
        def _make_in_reduce_ex(cls, *_):
            return cls()

        def __reduce_ex__(self, _):
            parts = (torch.zeros(4, 4, dtype=torch.uint8), torch.ones(1))
            return Float8Tensor._make_in_reduce_ex, parts

    declared(Float8Tensor, module)
    weight = {"decoder__layers__0__mlp__linear_fc2__weight": Float8Tensor()}
    source = changed(made, tmp_path / "core", **weight)
    with pytest.raises(FormatError, match=r"fc2\.weight'.* are Float8Tensor of Transformer Engine"):
        convert(source, tmp_path / "hf", "hf")


def test_rotary_frequencies_are_left_out_by_name(made, tmp_path):
    source = changed(made, tmp_path / "core", rotary_pos_emb__inv_freq=torch.ones(8))
    facts = convert(source, tmp_path / "hf", "hf")
    assert equal(hf.weights(tmp_path / "hf"), hf.weights(made / "hf"))
    assert "rotary_pos_emb.inv_freq" in {one["name"] for one in facts.dropped}


@pytest.mark.parametrize("form", ["core", "distributed"])
def test_an_output_layer_of_its_own_where_args_say_none(form, made, tmp_path):
    args = {"untie_embeddings_and_output_weights": False}
    if form == "core":
        source = changed(made, tmp_path / "core", args)
    else:
        source = tmp_path / "core"
        convert(made / "hf", source, "core")
        (file,) = source.glob("*/common.pt")
        state = torch.load(file, weights_only=False)
        state["args"].untie_embeddings_and_output_weights = False
        torch.save(state, file)
    with pytest.raises(CkptxError, match=r"are one .* 'output_layer\.weight' differs from"):
        convert(source, tmp_path / "hf", "hf")


@pytest.mark.parametrize("name", ["output_layer__weight", "v_head__summary__weight"])
def test_heads_with_one_output_are_named(name, made, tmp_path):
    source = changed(made, tmp_path / "core", **{name: torch.ones(1, 64)})
    with pytest.raises(FormatError, match=r"\[1, 64\] is the head of a value or reward model"):
        convert(source, tmp_path / "hf", "hf")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("llama/model-Q4_K_M.gguf", r"\(GGUF\), mostly quantised; transformers reads it"),
        ("llama.nemo", "an archive of NeMo 1, which its scripts"),
        ("session/0/iter_0000010_0_local.pt", "local checkpoint of NVIDIA's resiliency extension"),
    ],
)
def test_formats_of_others_are_named_with_their_tool(path, reason, tmp_path):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"GGUF" + bytes(60))
    source = tmp_path / path.partition("/")[0]
    with pytest.raises(CkptxError, match=reason):
        registry.detect(source)


def test_a_rank_s_local_file_is_named_although_torch_saved_it(tmp_path):
    file = tmp_path / "iter_0000010_0_local.pt"
    torch.save({"model": {"decoder.final_layernorm.weight": torch.ones(4)}}, file)
    with pytest.raises(CkptxError, match="local checkpoint of NVIDIA's resiliency extension"):
        registry.detect(file)


def test_a_part_of_a_checkpoint_is_told_from_the_whole(made, tmp_path):
    (rank,) = made.glob("core/*/mp_rank_00")
    with pytest.raises(CkptxError, match=f"the directory of one rank: give {rank.parent}"):
        registry.detect(rank)
    unfinished = tmp_path / "iter_0000010"
    unfinished.mkdir()
    for name in ("__0_0.distcp", "common.pt"):
        (unfinished / name).write_bytes(b"begun")
    with pytest.raises(CkptxError, match=r"no \.metadata, which is written last: .* not finished"):
        convert(unfinished, tmp_path / "hf", "hf")
    critic = tmp_path / "run" / "global_step_5" / "critic"
    shutil.copytree(rank.parent, critic / "dist_ckpt")
    with pytest.raises(CkptxError, match=f"a checkpoint lies below it: give {critic}"):
        registry.detect(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(
        CkptxError, match=r"global_step_5 holds 'critic' and no actor; .*--actor-dir"
    ):
        convert(tmp_path / "run", tmp_path / "hf", "hf")


@pytest.fixture
def engine(tmp_path):
    """A legacy model as Megatron-DeepSpeed saves it without a pipeline: the tree in the module."""
    hf.llama(tmp_path / "hf", num_hidden_layers=1, num_key_value_heads=8)
    convert(tmp_path / "hf", tmp_path / "legacy", "legacy", target_tensor_parallel_size=2)
    run = tmp_path / "run" / "global_step10"
    run.mkdir(parents=True)
    for rank, file in enumerate(sorted((tmp_path / "legacy").rglob("model_optim_rng.pt"))):
        state = torch.load(file, weights_only=False)
        state["args"].normalization, state["args"].num_key_value_heads = "rmsnorm", 8
        del state["args"].ckptx
        engine = {"module": state.pop("model"), **state, "dp_world_size": 1, "mp_world_size": 2}
        torch.save(engine, run / f"mp_rank_{rank:02d}_model_states.pt")
    (run / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    (run.parent / "latest").write_text("global_step10")
    return run


def test_a_legacy_tree_in_model_states_is_read(engine, tmp_path):
    assert registry.detect(engine.parent) == "deepspeed"
    facts = convert(engine.parent, tmp_path / "back", "hf")
    assert any("fp32 masters of an optimizer are not read" in note for note in facts.notes)
    assert any("optim_states" in str(one) for one in facts.dropped)
    convert(engine, tmp_path / "by_name", "hf", loader="legacy")
    wanted = hf.weights(tmp_path / "hf")
    for target in ("back", "by_name"):
        found = hf.weights(tmp_path / target)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_legacy_tree_that_is_not_read_is_named(engine, tmp_path):
    file = engine / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    state["args"].num_key_value_heads = 4
    torch.save(state, file)
    with pytest.raises(CkptxError, match="keeps query and key_value apart"):
        convert(engine, tmp_path / "refused", "hf")
    state["args"].num_key_value_heads = 8
    torch.save(state, file)
    (engine / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CkptxError, match=r"mp_rank_01_model_states\.pt"):
        convert(engine, tmp_path / "refused", "hf")
    state["module"] = {"language_model": {}}
    file.unlink()
    torch.save(state, engine / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(FormatError, match=r"the nested tree of a legacy .* parts of ZeRO 3"):
        convert(engine, tmp_path / "refused", "hf", loader="deepspeed")
