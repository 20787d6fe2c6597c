"""What every loader and saver must do, as classes that a test class inherits.

A class attribute says what is tested, and one method how a source comes about that the tested code
has not written itself. pytest collects the rest:

    class TestNpz(LoaderTests, SaverTests):
        loader, saver = NpzLoader(), NpzSaver()

        def write(self, directory, model):
            numpy.savez(directory / "model.npz", **model.hf())
            return Checkpoint(write_config(directory, model), model.canonical())

Models and options are sampled so that each occurs; override ``models``, ``option_sets`` or
``cases`` for more.
"""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ckptx.conversion.engine import make_plan
from ckptx.errors import CkptxError
from ckptx.model.canonical_names import check_shapes, keys_of
from ckptx.protocol.context import Context
from ckptx.protocol.contracts import Loader, Saver
from ckptx.protocol.messages import PASSTHROUGH, Begin, End, Message, Tensors
from ckptx.registry import registry
from ckptx.registry.open import checkpoint_messages
from ckptx.testing import conversion, faults, models
from ckptx.testing.models import MODELS, Arrays, Canonical, TinyModel
from ckptx.testing.tagged import assert_same, tagged

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

Options = Mapping[str, Any]
PARALLEL = {
    "tp": "target_tensor_parallel_size",
    "pp": "target_pipeline_parallel_size",
    "vpp": "target_virtual_pipeline_parallel_size",
}
_NO_TORCH = """
import base64, importlib, pickle, sys
from pathlib import Path
from ckptx.registry.open import checkpoint_messages
module, name, source, options = pickle.loads(base64.b64decode(sys.argv[1]))
loader = getattr(importlib.import_module(module), name)()
assert loader.detect(Path(source))
list(checkpoint_messages(Path(source), loader, options=options))
heavy = {"torch", "transformers", "megatron", "deepspeed"} & set(sys.modules)
sys.exit(f"imported {', '.join(sorted(heavy))}" if heavy else 0)
"""


@dataclass(frozen=True)
class Checkpoint:
    """A source that a test made: where it is, and what a loader must find in it."""

    path: Path
    expected: Canonical
    """By message and key; weights that pass through are in the message `PASSTHROUGH`."""
    options: Options = field(default_factory=dict)


class Parametrized:
    """Gives the tests of a class their arguments, from the class's own attributes."""

    models: ClassVar[Sequence[TinyModel | ParameterSet]] = MODELS
    """The models that a class is tested with; entries may be a ``pytest.param``."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise the arguments that the tests of a class have."""
        for argument in metafunc.fixturenames:
            if found := getattr(self, f"_{argument}s", None):
                metafunc.parametrize(argument, list(found()), ids=_label)

    def _models(self) -> Iterable[Any]:
        return self.models


class LoaderTests(Parametrized):
    """What a loader must do."""

    loader: ClassVar[Loader]

    def write(self, directory: Path, model: TinyModel) -> Checkpoint:
        """Write a source of this model, by another road than the saver's.

        ``directory`` exists and is empty.
        """
        raise NotImplementedError

    def test_sends_begin_tensors_end(self, model: TinyModel, tmp_path: Path) -> None:
        """Begin comes first, End last, each once; no message comes twice, nor do they change."""
        checkpoint = self.write(tmp_path, model)
        sent = self._load(checkpoint)
        assert isinstance(sent[0], Begin)
        assert isinstance(sent[-1], End)
        between = [message for message in sent[1:-1] if isinstance(message, Tensors)]
        assert len(between) == len(sent) - 2
        names = [(message.part, message.name, message.state) for message in between]
        assert len(set(names)) == len(names)
        assert self._load(checkpoint) == sent, "loading twice gives the same messages"
        assert pickle.loads(pickle.dumps(sent)) == sent, "messages cross a process boundary"

    def test_speaks_the_vocabulary(self, model: TinyModel, tmp_path: Path) -> None:
        """Every key is in the vocabulary and has the shape that the model's dimensions say."""
        begin, *rest = self._load(self.write(tmp_path, model))
        assert isinstance(begin, Begin)
        for message in rest:
            if isinstance(message, Tensors) and message.name != PASSTHROUGH:
                assert keys_of(message.name), message.name
                check_shapes(message.name, message.tensors, begin.parts[message.part])

    def test_finds_every_value(self, model: TinyModel, tmp_path: Path) -> None:
        """Messages, keys, dtypes, shapes and bytes are those that were written."""
        checkpoint = self.write(tmp_path, model)
        assert_equal(conversion.values(self._load(checkpoint)), checkpoint.expected)

    def test_declares_every_source(self, model: TinyModel, tmp_path: Path) -> None:
        """All bytes of the declared sources are sent or dropped by name, and no others are."""
        sent = self._load(self.write(tmp_path, model))
        begin = sent[0]
        assert isinstance(begin, Begin)
        assert all(Path(file).is_absolute() and Path(file).is_file() for file in begin.files)
        conversion.checked(conversion.plan_of_messages(sent), sent)

    def test_detects_its_own_alone(self, tmp_path: Path) -> None:
        """``detect`` is true for this format and false for what is something else."""
        own = tmp_path / "own"
        own.mkdir()
        assert self.loader.detect(self.write(own, _first(self.models)).path) is True
        for name, path in _strangers(tmp_path / "others"):
            if name != self.loader.name:
                assert self.loader.detect(path) is False, name

    def test_damage_is_an_error(self, tmp_path: Path) -> None:
        """A file that is cut or missing is one line of error, if it matters at all.

        A missing config may also mean that tensors pass through by name, which the loader remarks.
        """
        model = _first(self.models)
        whole = tmp_path / "whole"
        whole.mkdir()
        checkpoint = self.write(whole, model)
        files = [file for file in sorted(whole.rglob("*")) if file.is_file()]
        for injure in (faults.truncate, faults.drop):
            for number, file in enumerate(files):
                copy = tmp_path / f"{injure.__name__}-{number}"
                copy.mkdir()
                damaged = self.write(copy, model)
                injure(copy / file.relative_to(whole))
                self._check_damaged(damaged, checkpoint.expected, f"{injure.__name__} {file.name}")

    def test_imports_nothing_heavy(self, tmp_path: Path) -> None:
        """Detecting and loading import no torch, unless ``capabilities["torch"]`` says so."""
        if registry.capabilities("loader", self.loader).get("torch"):
            pytest.skip("the loader says that it needs torch")
        checkpoint = self.write(tmp_path, _first(self.models))
        kind = type(self.loader)
        call = (kind.__module__, kind.__qualname__, str(checkpoint.path), dict(checkpoint.options))
        argument = base64.b64encode(pickle.dumps(call)).decode()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109 - a string
        done = subprocess.run(
            [sys.executable, "-c", _NO_TORCH, argument],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def _load(self, checkpoint: Checkpoint) -> list[Message]:
        options = checkpoint.options
        return list(checkpoint_messages(checkpoint.path, self.loader, options=options))

    def _check_damaged(self, damaged: Checkpoint, expected: Canonical, what: str) -> None:
        try:
            sent = self._load(damaged)
            found = conversion.values(sent)
        except CkptxError as error:
            assert_one_line(error)
            return
        if PASSTHROUGH in found and PASSTHROUGH not in expected:
            assert conversion.end_of(sent).notes, f"{what}: passes through without a remark"
            return
        assert_equal(found, expected)


class SaverTests(Parametrized):
    """What a saver must do; results are read back with ``loader``."""

    loader: ClassVar[Loader]
    saver: ClassVar[Saver]

    def option_sets(self) -> Sequence[Options]:
        """Return the options to save with; by default a grid of what the capabilities say."""
        return parallel_grid(registry.capabilities("saver", self.saver))

    def cases(self) -> Iterable[Any]:
        """Return (model, options) pairs; by default a sample in which each of both occurs."""
        return paired([plain_model(model) for model in self.models], self.option_sets())

    def test_reads_back(self, case: tuple[TinyModel, Options], tmp_path: Path) -> None:
        """The plan is proved, written, and read back: byte for byte the same model."""
        model, options = case
        sent = models.messages(model, tmp_path / "source")
        result = conversion.save(self.saver, sent, tmp_path / "target", options)
        found = conversion.loaded(self.loader, result)
        assert_equal(unpadded(found, model), model.canonical(padded=False))

    def test_writes_the_same_twice(self, case: tuple[TinyModel, Options], tmp_path: Path) -> None:
        """The output depends on nothing but the messages and the options."""
        model, options = case
        sent = models.messages(model, tmp_path / "source")
        first, second = (tmp_path / name / "target" for name in ("first", "second"))
        for target in (first, second):
            target.parent.mkdir()
            conversion.save(self.saver, sent, target, options)
        assert_same_files(first, second)

    def test_plans_from_metadata_alone(
        self, case: tuple[TinyModel, Options], tmp_path: Path
    ) -> None:
        """Planning reads no weight: the files may be gone."""
        model, options = case
        sent = models.messages(model, tmp_path / "source")
        faults.drop(tmp_path / "source" / "tiny.bin")
        planned = make_plan(self.saver, sent, options, Context(target=tmp_path / "target"))
        assert planned.prove().tensors

    def test_refuses(
        self, change: Callable[[list[Message]], list[Message]], tmp_path: Path
    ) -> None:
        """What the format cannot hold, and what it needs and does not get, is one line of error."""
        sent = change(models.messages(_first(self.models), tmp_path / "source"))
        with pytest.raises(CkptxError) as error:
            make_plan(self.saver, sent, {}, Context(target=tmp_path / "target")).prove()
        assert_one_line(error.value)

    def test_keeps_unknown_models(self, tmp_path: Path) -> None:
        """Tensors of an unknown family keep their names and bytes, where the format takes them."""
        if not registry.capabilities("saver", self.saver).get("passthrough"):
            pytest.skip("the saver needs a known family")
        names = ("tower.weight", "tower.10.weight", "tower.2.weight", "scale", "nothing")
        dtypes, sizes = ("float32", "bfloat16", "bfloat16", "float64", "float32"), ((3, 3),) * 3
        arrays = {
            name: tagged(name, dtype, shape)
            for name, dtype, shape in zip(names, dtypes, (*sizes, (), (0, 4)), strict=True)
        }
        sent = models.passthrough_messages(arrays, tmp_path / "source")
        result = conversion.save(self.saver, sent, tmp_path / "target", {})
        assert_equal_arrays(conversion.loaded_by_name(self.loader, result), arrays, PASSTHROUGH)

    def _cases(self) -> Iterable[Any]:
        return self.cases()

    def _changes(self) -> Iterable[Any]:
        return faults.CHANGES


def parallel_grid(capabilities: Mapping[str, Any]) -> Sequence[Options]:
    """Return options for the parallel sizes that a saver can write; always no options at all."""
    sizes: list[dict[str, int]] = [{}, {"tp": 2}, {"tp": 4}, {"pp": 2}]
    sizes += [{"tp": 2, "pp": 4}, {"pp": 2, "vpp": 2}]
    return [
        {PARALLEL[name]: size for name, size in entry.items()}
        for entry in sizes
        if all(capabilities.get(name) for name in entry)
    ]


def fits(model: TinyModel, options: Options) -> bool:
    """Return whether a model divides by these parallel sizes, by Megatron's rules."""
    tp = options.get(PARALLEL["tp"]) or 1
    stages = (options.get(PARALLEL["pp"]) or 1) * (options.get(PARALLEL["vpp"]) or 1)
    return models.divides(model.spec, tp) and not model.spec.num_layers % stages


def paired(
    models: Sequence[TinyModel], option_sets: Sequence[Options]
) -> list[tuple[TinyModel, Options]]:
    """Return fitting pairs in which every model and every set of options occurs."""
    found: list[tuple[TinyModel, Options]] = []
    for number in range(max(len(models), len(option_sets))):
        model = models[number % len(models)]
        for step in range(len(option_sets)):
            options = option_sets[(number + step) % len(option_sets)]
            if fits(model, options):
                found.append((model, options))
                break
    for options in option_sets:
        if all(options != used for _, used in found):
            found += [(model, options) for model in models if fits(model, options)][:1]
    return found


def unpadded(found: Canonical, model: TinyModel) -> Canonical:
    """Return tensors without the rows that a format pads the vocabulary with."""
    cut = {message: dict(keys) for message, keys in found.items()}
    for message, key in (("embeddings", "word embeddings"), ("output layer", "weight")):
        if key in cut.get(message, {}):
            cut[message][key] = cut[message][key][: model.vocabulary]
    return cut


def assert_equal(found: Canonical, expected: Canonical) -> None:
    """Fail unless both have the same messages, keys, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    among = {f"{m}: {key}": array for m, keys in expected.items() for key, array in keys.items()}
    for message, keys in expected.items():
        assert_equal_arrays(found[message], keys, message, among)


def assert_equal_arrays(
    found: Arrays, expected: Arrays, place: str, among: Arrays | None = None
) -> None:
    """Fail unless both have the same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected), place
    for name, array in expected.items():
        assert_same(found[name], array, f"{place}: {name}", among or expected)


def assert_same_files(first: Path, second: Path) -> None:
    """Fail unless two files or directories hold the same bytes under the same names."""
    contents = [
        {path.relative_to(root.parent): path.read_bytes() for path in _files(root)}
        for root in (first, second)
    ]
    assert sorted(contents[0]) == sorted(contents[1])
    assert [name for name, data in contents[0].items() if contents[1][name] != data] == []


def assert_one_line(error: CkptxError) -> None:
    """Fail unless an error is one line that says something."""
    assert str(error).strip()
    assert "\n" not in str(error), str(error)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in (root, *root.rglob("*")) if path.is_file())


def _label(value: Any) -> str | None:
    match value:
        case TinyModel():
            return str(value)
        case (TinyModel() as model, dict() as options):
            said = [f"{name}={option}" for name, option in options.items()]
            return "-".join([str(model), *said])
        case _ if callable(value):
            return str(value.__name__).strip("_")
    return None


def plain_model(entry: TinyModel | ParameterSet) -> TinyModel:
    """Return the model of an entry, which may be a ``pytest.param``."""
    if isinstance(entry, TinyModel):
        return entry
    (model,) = entry.values
    assert isinstance(model, TinyModel)
    return model


def _first(models: Sequence[TinyModel | ParameterSet]) -> TinyModel:
    return plain_model(models[0])


def _strangers(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield sources of some format or none, each with the name of the loader it is for."""
    model = models.tiny(num_layers=1)
    places = {name: directory / name for name in ("hf", "core", "core-ranks", "text", "empty")}
    for path in places.values():
        path.mkdir(parents=True)
    models.write_safetensors(
        models.write_config(places["hf"], model) / "model.safetensors", model.hf()
    )
    (places["core"] / "latest_checkpointed_iteration.txt").write_text("release")
    (places["core-ranks"] / "mp_rank_00").mkdir()
    (places["text"] / "README.md").write_text("no checkpoint\n")
    for name, path in places.items():
        yield name.partition("-")[0], path
    yield "text", places["text"] / "README.md"
    yield "hf", places["hf"] / "model.safetensors"
    yield "hf", places["hf"] / "config.json"
    for name, member, path in (
        ("pytorch", "model/data.pkl", directory / "model.pt"),
        ("npz", "weight.npy", directory / "model.npz"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"")
        yield name, path
