"""What every family must do, as a class that a test class inherits.

    class TestGranite(SchemaTests):
        families = (FAMILY,)
        configs = ({"model_type": "granite", "hidden_size": 32, ...},)

pytest collects the rest. The kit itself names no family.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptx.errors import SchemaError
from ckptx.model.canonical_names import dimensions, keys_of
from ckptx.model.family import Family
from ckptx.model.layout import Layout, Rule
from ckptx.model.pipeline_parallel import stage_ranks
from ckptx.model.sharding import Gatherer, Shards, check_message, shard_tensors
from ckptx.model.spec import ModelSpec
from ckptx.model.transforms import IDENTITY
from ckptx.registry import registry
from ckptx.registry.families import family_of
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor, Shape, Stored, stored
from ckptx.tensors.pieces import pieces
from ckptx.testing.contracts import PARALLEL, Parametrized, plain_model
from ckptx.testing.conversion import convert
from ckptx.testing.models import divides, read_safetensors, write_safetensors
from ckptx.testing.tagged import tagged


class SchemaTests(Parametrized):
    """What the layouts of a family must do; ``families`` are those to test."""

    families: ClassVar[Sequence[Family]]
    configs: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Tiny ``config.json``s of the families, which go to Megatron and back; the first are neutral.

    One of a model that Megatron cannot compute must be refused by name."""

    def specs(self, family: Family) -> Sequence[ModelSpec]:
        """Return the models to test a family with; by default those of its configs."""
        own = [plain_model(model).spec for model in self.models]
        own += [family_.from_config(c) for c in self.configs if (family_ := family_of(c))]
        return [spec for spec in own if spec.family == family.name]

    def write(self, directory: Path, config: Mapping[str, Any]) -> Path:
        """Write a model directory of a config, and return it; transformers does where it is."""
        family = family_of(config)
        assert family is not None, "a plugin registers the family"
        try:
            import torch
            import transformers
        except ImportError:
            return _written_by_names(directory, config, family)
        made = transformers.AutoConfig.for_model(**config)
        model = _transformers_class(transformers, family.from_config(config))(made)
        with torch.no_grad():
            for name, values in model.named_parameters():
                pattern = tagged(name, "float32", list(values.shape))
                values.copy_(torch.from_numpy(np.nan_to_num(pattern).clip(-1, 1) / 16))
        model.save_pretrained(directory)
        return directory

    def _round_trips(self) -> Iterator[Any]:
        for number, config in enumerate(self.configs):
            for beside in ("config", "nothing", "hf-base"):
                yield pytest.param((config, beside), id=f"{number}-{beside}")

    def test_comes_back_from_megatron(
        self, round_trip: tuple[Mapping[str, Any], str], tmp_path: Path
    ) -> None:
        """Hugging Face to Megatron Core and back: bit for bit, and its config means the same.

        The way back has the config that came along, none, or one that ``--hf-base`` names.
        """
        config, beside = round_trip
        family = family_of(config)
        assert family is not None, "a plugin registers the family"
        source = self.write(tmp_path / "source", config)
        spec = family.from_config(_config_in(source))
        hf, core = registry.loader("hf"), registry.saver("core")
        sizes = {
            PARALLEL["tp"]: 2 if divides(spec, 2) else 1,
            PARALLEL["pp"]: 1 if spec.num_layers % 2 else 2,
        }
        reasons = [family.refused["mcore"]] if "mcore" in family.refused else []
        if reasons := [*reasons, *family.config.unsupported_by_megatron(spec)]:
            with pytest.raises(SchemaError) as refusal:
                convert(hf, source, core, tmp_path / "core", sizes)
            assert all(reason in str(refusal.value) for reason in reasons)
            return
        convert(hf, source, core, tmp_path / "core", sizes)
        options: dict[str, Any] = {}
        if beside != "config":
            (found,) = (tmp_path / "core").rglob("config.json")
            found.unlink()
        if beside == "hf-base":
            options["hf_base"] = source
        back = convert(
            registry.loader("core"),
            tmp_path / "core",
            registry.saver("hf"),
            tmp_path / "back",
            loader_options=options,
        )
        assert read_safetensors(back) == read_safetensors(source)
        _assert_same_config(family, source, back)

    def _layouts(self) -> Iterator[Any]:
        for family in self.families:
            specs = self.specs(family)
            assert specs, f"no model to test family {family.name} with"
            for kind, layout in family.layouts.items():
                for number, spec in enumerate(specs):
                    label = f"{layout.name}-{family.name}-{number}"
                    yield pytest.param((family, kind, spec), id=label)

    def _hf_layouts(self) -> Iterator[Any]:
        return (entry for entry in self._layouts() if entry.values[0][1] == "hf")

    def _expert_layouts(self) -> Iterator[Any]:
        for entry in self._layouts():
            family, kind, spec = entry.values[0]
            if any(one.ep is not None and one.tp is not None for one in _rules(family, kind, spec)):
                yield entry

    def test_names_are_disjoint(self, layout: tuple[Family, str, ModelSpec]) -> None:
        """No two tensors have one name, in any spelling, and no name is one that is ignored."""
        family, kind, spec = layout
        found = family.layouts[kind]
        names = [
            name
            for _, layer, rules in found.expand(spec)
            for entry in rules
            for spelling in entry.spellings
            for name in spelling.named(layer, spec.num_experts or 0)
        ]
        assert len(set(names)) == len(names)
        assert not [name for name in names if found.ignored and name.endswith(found.ignored)]

    def test_speaks_the_vocabulary(self, layout: tuple[Family, str, ModelSpec]) -> None:
        """Every key is in the vocabulary, once, and Megatron's ranks cut it along its axis.

        Others may cut along another: shards of Llama 2 divide the embedding by its width.
        """
        family, kind, spec = layout
        for message, _, rules in family.layouts[kind].expand(spec):
            known = keys_of(message, spec)
            keys = [key for entry in rules for key in entry.keys]
            assert len(set(keys)) == len(keys)
            assert set(keys) <= set(known)
            for entry in rules:
                for key in entry.keys:
                    megatron = "mcore" in kind or kind == "legacy"
                    axes = (known[key].tp,) if megatron else range(len(known[key].shape))
                    assert entry.tp is None or entry.tp in axes, f"{message}: {key}"

    def test_packing_and_unpacking_undo_each_other(
        self, layout: tuple[Family, str, ModelSpec]
    ) -> None:
        """Every element comes back to its place, whether one starts from messages or from names.

        What was joined and is divided again is the very same lazy tensor, with nothing around it.
        """
        family, kind, spec = layout
        found = family.layouts[kind]
        for message, layer, rules in found.expand(spec):
            canonical = _stored_message(rules, message, spec)
            check_message(rules, canonical, message, found.name)
            packed = shard_tensors(rules, canonical, spec, layer)
            _assert_elements(_taken(found, spec, rules, [packed], layer), canonical)
            named = _stored({name: tensor.shape for name, tensor in packed.items()}, spec.dtype)
            unpacked = _taken(found, spec, rules, [named], layer)
            _assert_elements(shard_tensors(rules, unpacked, spec, layer), named)
            for entry in rules:
                own = entry.spellings[0].names
                if "{expert}" in own[0] and len(own) < len(entry.keys):
                    continue  # experts divided, the tensors of each joined
                names = shard_tensors([entry], canonical, spec, layer)
                if len(entry.keys) > len(names) or entry.spellings[0].transform is IDENTITY:
                    taken = _taken(found, spec, [entry], [names], layer)
                    assert taken == {key: canonical[key] for key in entry.keys}
                if len(names) >= len(entry.keys):
                    given = shard_tensors([entry], unpacked, spec, layer)
                    assert given == {name: named[name] for name in names}

    def test_cut_and_joined_is_whole(self, layout: tuple[Family, str, ModelSpec]) -> None:
        """What the ranks of any tensor-parallel size hold is the tensor, joined again."""
        family, kind, spec = layout
        found = family.layouts[kind]
        for tp in (2, 4):
            if spec.num_query_groups % tp or spec.ffn_hidden_size % tp:
                continue
            for message, layer, rules in found.expand(spec):
                if all(entry.tp is None for entry in rules):
                    continue
                before = _stored_message(rules, message, spec, rows=48)
                shards = [
                    shard_tensors(rules, before, spec, layer, rank) for rank in stage_ranks(tp)
                ]
                joined = _taken(found, spec, rules, shards, layer)
                _assert_elements(joined, before)

    def test_experts_cut_and_joined_are_whole(
        self, expert_layout: tuple[Family, str, ModelSpec]
    ) -> None:
        """What the ranks of any expert-parallel sizes hold are the experts, joined again."""
        family, kind, spec = expert_layout
        found = family.layouts[kind]
        for tp, ep, etp in ((1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (1, 4, 2), (2, 4, 1)):
            ranks = stage_ranks(tp, ep, etp)
            for message, layer, rules in found.expand(spec):
                before = _stored_message(rules, message, spec, rows=48)
                held = [shard_tensors(rules, before, spec, layer, rank) for rank in ranks]
                joined = _taken(found, spec, rules, Shards.of_grid(held, ranks), layer)
                _assert_elements(joined, before)

    def test_agrees_with_transformers(self, hf_layout: tuple[Family, str, ModelSpec]) -> None:
        """Names and shapes are those of transformers' own model, built on no device."""
        family, kind, spec = hf_layout
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.for_model(**family.to_config(spec))
        with torch.device("meta"):
            state = _transformers_class(transformers, spec)(config).state_dict()
        for _, _, name in family.layouts[kind].repeated:
            state.pop(name, None)
        if spec.tied:
            for name in family.layouts[kind].names_of("output layer", "weight"):
                state.pop(name, None)
        else:
            first, *others = family.layouts[kind].names_of("output layer", "weight")
            for name in set(others) & set(state):
                state[first] = state.pop(name)
        found: dict[str, tuple[int, ...]] = {}
        for message, layer, rules in family.layouts[kind].expand(spec):
            whole = _stored_message(rules, message, spec)
            for entry in rules:
                named = shard_tensors([_spelt_as(entry, state, layer)], whole, spec, layer)
                found.update((name, tensor.shape) for name, tensor in named.items())
        assert found == {name: tuple(tensor.shape) for name, tensor in state.items()}


def _transformers_class(transformers: Any, spec: ModelSpec) -> Any:
    """Return what builds a model of a config: its class, if it is no causal model."""
    if "Bert" in spec.architecture:
        return getattr(transformers, spec.architecture)
    return transformers.AutoModelForCausalLM.from_config


def _written_by_names(directory: Path, config: Mapping[str, Any], family: Family) -> Path:
    """Write a model by the names and shapes that the family's own layout says."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    spec, arrays = family.from_config(config), {}
    for message, layer, rules in family.layout("hf").expand(spec):
        whole = _stored_message(rules, message, spec)
        for name, tensor in shard_tensors(rules, whole, spec, layer).items():
            arrays[name] = tagged(name, spec.dtype, list(tensor.shape))
    write_safetensors(directory / "model.safetensors", arrays)
    return directory


def _config_in(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def _assert_same_config(family: Family, source: Path, back: Path) -> None:
    """Fail unless two model directories are of one model, to ckptx and to transformers."""
    before, after = (family.from_config(_config_in(place)) for place in (source, back))
    assert after == before
    try:
        import torch
        import transformers
    except ImportError:
        return
    classes = {_config_in(place)["architectures"][0] for place in (source, back)}
    (name,) = classes
    tokens = torch.arange(12).reshape(2, 6) % (before.vocab_size or 12)
    logits = []
    for place in (source, back):
        model = getattr(transformers, name).from_pretrained(place)
        with torch.no_grad():
            logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


def _stored_message(
    rules: Sequence[Rule], message: str, spec: ModelSpec, rows: int | None = None
) -> dict[str, LazyTensor]:
    """Return a tensor of the right shape for every key of the rules, each in its own place."""
    sizes = {**dimensions(spec), "vocab": rows or spec.vocab_size or 40}
    known = keys_of(message, spec)
    keys = [key for entry in rules for key in entry.keys]
    shapes = {key: tuple(sizes[symbol] for symbol in known[key].shape) for key in keys}
    return _stored(shapes, spec.dtype)


def _stored(shapes: Mapping[str, Shape], dtype: str) -> dict[str, LazyTensor]:
    """Return tensors of these shapes, far from each other in one file."""
    return {
        name: stored(0, number << 32, dtype, shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def _assert_elements(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    """Fail unless every element of the tensors comes from the same byte."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(_addresses(found[name]), _addresses(tensor)), name


def _rules(family: Family, kind: str, spec: ModelSpec) -> list[Rule]:
    return [entry for _, _, rules in family.layouts[kind].expand(spec) for entry in rules]


def _spelt_as(entry: Rule, names: Container[str], layer: int | None) -> Rule:
    """Return a rule in the spelling whose names there are, else as it is written."""
    for spelling in entry.spellings:
        if all(name in names for name in spelling.named(layer, 1)):
            return replace(entry, spellings=(spelling,))
    return entry


def _taken(
    layout: Layout,
    spec: ModelSpec,
    rules: Sequence[Rule],
    shards: Shards | Sequence[dict[str, LazyTensor]],
    layer: int | None,
) -> dict[str, LazyTensor]:
    """Return the canonical tensors that a layout takes from shards; nothing may be left."""
    if not isinstance(shards, Shards):
        shards = Shards.of_ranks([dict(shard) for shard in shards])
    taker = Gatherer(layout, spec)
    found = taker.take(rules, shards, layer)
    taker.finish([name for copies in shards.dense for shard in copies for name in shard])
    return found


def _addresses(tensor: LazyTensor) -> NDArray[np.int64]:
    """Return the byte that every element of a tensor comes from."""
    found = np.full(tensor.shape, -1, np.int64)
    for piece in pieces(tensor):
        leaf = piece.leaf
        assert isinstance(leaf, Stored)
        itemsize = ITEMSIZE[leaf.dtype]
        steps = [stride * found.itemsize for stride in piece.strides]
        place = np.ndarray(leaf.shape, np.int64, found, piece.offset * found.itemsize, steps)
        index = np.indices(leaf.shape).reshape(len(leaf.shape), -1)
        place[...] = (leaf.offset + itemsize * (leaf.strides @ index)).reshape(leaf.shape)
    return found
