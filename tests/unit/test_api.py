"""``import ckptx``: what it gives, and what it leaves alone."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckptx

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file as load_torch

ROOT = Path(ckptx.__file__).resolve().parents[1]
FUNCTIONS = (
    "open",
    "convert",
    "plan",
    "verify",
    "inspect",
    "modify",
    "average",
    "formats",
    "families",
)


@pytest.fixture
def llama(tmp_path, write_llama) -> Path:
    return write_llama(tmp_path / "llama", shards=2)


@pytest.fixture
def weights(llama) -> dict[str, np.ndarray]:
    files = sorted(llama.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def run_script(text: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a plain script, which has no guard."""
    (cwd / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, cwd / "script.py", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def open_files() -> set[int]:
    """The descriptors of this process."""
    return {number for number in range(256) if Path(f"/proc/self/fd/{number}").exists()}


class TestNames:
    def test_all_are_there(self):
        for name in ckptx.__all__:
            assert getattr(ckptx, name) is not None
        assert set(FUNCTIONS) <= set(ckptx.__all__) <= set(dir(ckptx))

    def test_an_unknown_one_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="'ckptx' has no attribute 'nothing'"):
            _ = ckptx.nothing

    def test_no_child_carries_the_name_of_a_function(self):
        children = {path.stem for path in (ROOT / "ckptx").iterdir()}
        assert not children & set(FUNCTIONS)

    def test_functions_stay_functions_when_all_is_imported(self, tmp_path):
        script = f"""
import contextlib, importlib, inspect, pkgutil, ckptx
for module in pkgutil.walk_packages(ckptx.__path__, "ckptx."):
    if not module.name.endswith("__main__"):
        with contextlib.suppress(ImportError):  # of a framework
            importlib.import_module(module.name)
for name in {FUNCTIONS}:
    assert inspect.isfunction(getattr(ckptx, name)), name
"""
        done = run_script(script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    def test_importing_it_imports_nothing(self, tmp_path):
        script = "import sys, ckptx; print(*(m for m in sys.modules if m.startswith('ckptx')))"
        found = run_script(script, cwd=tmp_path).stdout.split()
        assert sorted(found) == ["ckptx", "ckptx.version"]


class TestOpen:
    def test_is_a_mapping_of_what_the_files_hold(self, llama, weights):
        with ckptx.open(llama) as checkpoint:
            assert set(checkpoint) == set(weights)
            assert (checkpoint.format, checkpoint.family) == ("hf", "llama")
            assert checkpoint.spec.num_layers == 4
            assert checkpoint.config["hidden_size"] == 16
            assert checkpoint.nbytes == sum(value.nbytes for value in weights.values())
            for name, lazy in checkpoint.items():
                assert lazy.shape == weights[name].shape
                assert np.array_equal(lazy[...], weights[name])
                assert torch.equal(lazy.torch(), torch.from_numpy(weights[name]))

    def test_names_are_hugging_faces_whatever_the_format(self, llama, weights, tmp_path):
        ckptx.convert(llama, tmp_path / "core", to="core", tp=2, pp=2)
        with ckptx.open(tmp_path / "core") as checkpoint:
            assert checkpoint.format == "core"
            for name, value in weights.items():
                assert np.array_equal(checkpoint[name], value)

    @pytest.mark.parametrize(
        "index",
        [
            *(0, -1, (3, 5), (..., 2), (-2, ...), ..., (), slice(3, 9), slice(None, None, 3)),
            *(slice(9, 2, -2), (slice(5, 5),), (slice(None), slice(-4, None)), slice(50, 90)),
            *((slice(30, 1, -7), 3), (slice(2), slice(None, None, -1)), np.int64(4)),
        ],
        ids=str,
    )
    def test_indices_are_numpys(self, index, llama, weights):
        name = "model.embed_tokens.weight"
        with ckptx.open(llama) as checkpoint:
            found = checkpoint[name][index]
        assert np.array_equal(found, weights[name][index])
        assert found.shape == weights[name][index].shape

    @pytest.mark.parametrize("index", [37, (0, 16), (0, 0, 0), (..., ...), (-38,)])
    def test_what_is_out_of_range_is_an_index_error(self, index, llama, weights):
        with pytest.raises(IndexError):
            _ = weights["model.embed_tokens.weight"][index]
        with ckptx.open(llama) as checkpoint, pytest.raises(IndexError):
            _ = checkpoint["model.embed_tokens.weight"][index]

    @pytest.mark.parametrize("index", [None, True, [0], "0", 1.0])
    def test_other_indices_are_type_errors(self, index, llama):
        with ckptx.open(llama) as checkpoint, pytest.raises(TypeError):
            _ = checkpoint["model.embed_tokens.weight"][index]

    def test_only_what_is_asked_for_is_read(self, llama):
        """Of a file that is cut, the rows before the cut are there."""
        save_file({"w": np.arange(1 << 20, dtype=np.float32)}, llama / "w.safetensors")
        for file in llama.glob("model*"):
            file.unlink()
        (llama / "config.json").unlink()
        with ckptx.open(llama / "w.safetensors") as checkpoint:
            os.truncate(llama / "w.safetensors", 1 << 20)
            assert checkpoint["w"][1000] == 1000
            with pytest.raises(ckptx.ConversionError, match="was cut or changed"):
                _ = checkpoint["w"][-1]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "int64", "bool"])
    def test_torch_has_the_dtype(self, dtype, tmp_path):
        from safetensors.torch import save_file

        wanted = torch.arange(-6, 6).reshape(3, 4).float().to(getattr(torch, dtype))
        save_file({"w": wanted}, tmp_path / "model.safetensors")
        with ckptx.open(tmp_path / "model.safetensors") as checkpoint:
            found = checkpoint["w"].torch()
        assert found.dtype == wanted.dtype
        assert torch.equal(found.float(), wanted.float())

    def test_a_name_that_is_not_there_is_answered_with_near_ones(self, llama):
        with ckptx.open(llama) as checkpoint:
            with pytest.raises(KeyError, match=r"as 'model\.norm\.weight'"):
                checkpoint["model.norms.weight"]
            assert "model.norms.weight" not in checkpoint

    def test_nothing_is_read_once_it_is_closed(self, llama):
        checkpoint = ckptx.open(llama)
        lazy = checkpoint["lm_head.weight"]
        checkpoint.close()
        checkpoint.close()
        with pytest.raises(ValueError, match="was closed"):
            _ = lazy[0]

    def test_a_tensor_holds_its_checkpoint_open(self, llama, weights):
        lazy = ckptx.open(llama)["lm_head.weight"]
        gc.collect()
        assert np.array_equal(lazy[...], weights["lm_head.weight"])

    def test_what_is_left_is_closed(self, llama):
        before = open_files()
        ckptx.open(llama)["lm_head.weight"][0]
        gc.collect()
        assert open_files() == before

    def test_prints_and_shows_itself(self, llama):
        with ckptx.open(llama) as checkpoint:
            assert f"{llama}: hf, llama, 39 tensors" in str(checkpoint)
            assert "model.embed_tokens.weight" in checkpoint._repr_html_()


class TestOptions:
    def test_either_spelling_is_the_option(self, llama, tmp_path):
        spellings = {"tp": 2}, {"target_tensor_parallel_size": 2}, {"tp": "2"}
        plans = [ckptx.plan(llama, tmp_path / "out", to="core", **one) for one in spellings]
        for plan in plans:
            assert {"__0_0.distcp", "__1_0.distcp"} <= {file["path"] for file in plan.files}

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"tpp": 2}, ckptx.PluginError, "'tpp' is no option here; did you mean 'tp'"),
            ({"overwrit": 1}, ckptx.PluginError, "did you mean 'overwrite'"),
            ({"tp": 1, "target_tensor_parallel_size": 1}, ckptx.PluginError, "give it once"),
            ({"tp": "two"}, ckptx.PlanError, "tp: .*integer"),
            ({"tp": 0}, ckptx.PlanError, "tp: "),
            ({"digest": "md5"}, ckptx.PlanError, "digest: .*xxh3_128"),
            ({"max_memory": "much"}, ckptx.PlanError, "is not a size"),
            ({"dtype": "int3"}, ckptx.PlanError, "is not one of"),
            ({"from_": "hff"}, ckptx.PluginError, "did you mean 'hf'"),
        ],
        ids=str,
    )
    def test_wrong_ones_are_refused(self, options, error, message, llama, tmp_path):
        with pytest.raises(error, match=message):
            ckptx.convert(llama, tmp_path / "out", to="core", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]

    @pytest.mark.parametrize("place", ["", Path("missing")])
    def test_a_source_that_is_not_there(self, place, tmp_path):
        with pytest.raises(ckptx.CkptxError, match=r"empty|missing"):
            ckptx.convert(place, tmp_path / "out", to="hf")

    def test_dtypes_and_sizes_are_the_commands(self, llama, tmp_path):
        ckptx.convert(llama, tmp_path / "out", to="hf", dtype="half", max_memory="1G", threads=1)
        found = load_torch(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.float16}

    def test_signatures_name_what_every_function_takes(self):
        taken = inspect.signature(ckptx.convert).parameters
        assert [*taken] == ["source", "target", "to", "from_", "isolate", "options"]


class TestResults:
    def test_a_comparison_is_neither_true_nor_false(self, llama):
        comparison = ckptx.verify(llama, llama)
        assert comparison.equal
        with pytest.raises(TypeError, match=r"\.equal"):
            bool(comparison)

    def test_what_differs_is_said(self, llama, tmp_path):
        ckptx.modify(llama, tmp_path / "out", cast={"model.norm.*": "bf16"})
        with ckptx.open(tmp_path / "out") as changed:
            comparison = ckptx.verify(llama, changed)
        assert not comparison.equal
        assert [one.kind for one in comparison.differences] == ["recast"]

    def test_all_print_and_show_themselves(self, llama, tmp_path):
        results = [
            ckptx.plan(llama, tmp_path / "out", to="hf"),
            ckptx.convert(llama, tmp_path / "out", to="hf"),
            ckptx.inspect(llama),
            ckptx.verify(llama, tmp_path / "out"),
        ]
        kinds = [ckptx.Plan, ckptx.Report, ckptx.Inspection, ckptx.Comparison]
        assert [type(one) for one in results] == kinds
        for one in results:
            assert str(one) == one.render(80)
            assert one._repr_html_().startswith("<pre>")
            assert one.to_json()

    def test_formats_and_families(self):
        found = {format.name: format for format in ckptx.formats()}
        assert found["hf"] == ("hf", True, True)
        assert found["deepspeed"] == ("deepspeed", True, False)
        assert {"llama", "qwen3"} <= set(ckptx.families())


def state() -> dict[str, object]:
    """What a function must leave as it was."""
    root = logging.getLogger()
    return {
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "loggers": (list(root.handlers), root.level),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "place": Path.cwd(),
        "path": (id(sys.path), list(sys.path)),
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "files": open_files(),
        "threads": threading.active_count(),
    }


class TestInThisProcess:
    @pytest.mark.parametrize("isolate", [False, True])
    def test_leaves_everything_as_it_was(self, isolate, llama, tmp_path, capfd):
        ckptx.plan(llama, tmp_path / "out", to="core")  # imports what it needs
        before = state()
        ckptx.convert(llama, tmp_path / "out", to="core", isolate=isolate)
        with pytest.raises(ckptx.PlanError, match="exists"):
            ckptx.convert(llama, tmp_path / "out", to="core", isolate=isolate)
        assert state() == before
        assert capfd.readouterr() == ("", "")

    def test_works_in_threads_at_once(self, llama, weights, tmp_path):
        def there_and_back(number: int) -> Path:
            core, back = tmp_path / f"core{number}", tmp_path / f"back{number}"
            ckptx.convert(llama, core, to="core", tp=2)
            ckptx.convert(core, back, to="hf")
            return back

        with ThreadPoolExecutor(2) as pool:
            for back in pool.map(there_and_back, range(4)):
                found = load_file(back / "model.safetensors")
                assert {name: value.tolist() for name, value in found.items()} == {
                    name: value.tolist() for name, value in weights.items()
                }

    @pytest.mark.parametrize("isolate", [False, True])
    def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_nothing(self, isolate, llama, tmp_path):
        script = f"""
import os, signal, sys, ckptx
from ckptx.conversion import isolated
from ckptx.writing import writer

def after(function):
    def run(*arguments):
        result = function(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return result
    return run

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
writer.execute = after(writer.execute)
isolated._outcome = after(lambda line: None)
try:
    ckptx.convert(sys.argv[1], "out", to="core", isolate={isolate})
except KeyboardInterrupt as stopped:
    print("stopped by", type(stopped).__name__, os.listdir())
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no child is left")
"""
        place = tmp_path / "place"
        place.mkdir()
        done = run_script(script, llama, cwd=place)
        said = "stopped by KeyboardInterrupt ['script.py']\nno child is left\n"
        assert (done.stdout, done.returncode) == (said, 0), done.stderr

    def test_an_error_leaves_nothing(self, llama, tmp_path, monkeypatch):
        from ckptx.writing import writer

        def broken(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "execute", broken)
        with pytest.raises(ckptx.CutShortError, match="nothing was written"):
            ckptx.convert(llama, tmp_path / "out", to="core")
        assert [path.name for path in tmp_path.iterdir()] == ["llama"]


class TestIsolated:
    def test_a_script_without_a_guard_works(self, llama, tmp_path):
        script = """
import sys, threading, ckptx
print("once")
found = []
work = lambda: found.append(ckptx.convert(sys.argv[1], "out", to="core", tp=2, isolate=True))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found[0].saver, ckptx.verify(sys.argv[1], "out").equal)
"""
        done = run_script(script, llama, cwd=tmp_path)
        assert (done.stdout, done.stderr) == ("once\ncore True\n", "")

    def test_a_notebook_works(self, llama, tmp_path):
        """Its ``__main__`` has no file."""
        script = "import sys, ckptx; ckptx.convert(sys.argv[1], 'out', to='hf', isolate=True)"
        done = subprocess.run(
            [sys.executable, "-", str(llama)],
            input=script,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_errors_are_the_same(self, llama, tmp_path):
        (tmp_path / "json.py").write_text("raise SystemExit('a module of the working directory')")
        for isolate in (False, True):
            with pytest.raises(ckptx.PluginError, match="did you mean 'tp'"):
                ckptx.convert(llama, tmp_path / "out", to="core", tpp=2, isolate=isolate)

    def test_its_process_cleans_up_after_an_error(self, llama, tmp_path, capfd, monkeypatch):
        """It is not ended while it does, which would leave semaphores, and a warning of them."""
        slow = "import atexit, multiprocessing.util, time\natexit.register(time.sleep, 0.3)\n"
        (tmp_path / "slow").mkdir()
        (tmp_path / "slow" / "sitecustomize.py").write_text(slow)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "slow"))
        ckptx.convert(llama, tmp_path / "out", to="core")
        with pytest.raises(ckptx.PlanError, match="exists"):
            ckptx.convert(llama, tmp_path / "out", to="core", isolate=True)
        assert capfd.readouterr() == ("", "")

    def test_a_plan_is_made_there_too(self, llama, tmp_path):
        here, there = (
            ckptx.plan(llama, tmp_path / "out", to="core", tp=2, isolate=isolate).to_json()
            for isolate in (False, True)
        )
        assert {**here, "peak_memory": 0} == {**there, "peak_memory": 0}

    def test_megatron_style_modules_always_are(self, llama, tmp_path, monkeypatch):
        (tmp_path / "saver_named.py").write_text(
            "import os\n"
            "from pathlib import Path\n"
            "def add_arguments(parser):\n"
            "    parser.add_argument('--greeting', required=True)\n"
            "def save_checkpoint(queue, args):\n"
            "    while queue.get() != 'done':\n"
            "        pass\n"
            "    Path(args.save_dir, 'said').write_text(f'{args.greeting} {os.getpid()}')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        ckptx.convert(llama, tmp_path / "out", to="named", greeting="hello")
        greeting, process = (tmp_path / "out" / "said").read_text().split()
        assert greeting == "hello"
        assert int(process) != os.getpid()
        assert "saver_named" not in sys.modules
