"""The documents say what the program does: generated parts, names, links, and commands that run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptx.cli import conversion
from ckptx.cli import main as cli
from ckptx.model import canonical_names
from ckptx.protocol import hookspecs, messages
from ckptx.registry import registry
from docs import refresh as docs

ROOT = docs.ROOT
PAGES = [*docs.documents(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a document, as forges and mkdocs make them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the commands of a document's ``shell`` blocks, without comments."""
    lines = "".join(blocks(text, "shell")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_generated_parts_are_fresh():
    run = subprocess.run(
        [sys.executable, "-m", "docs.refresh", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_generated_part_is_used():
    used = {name for text in DOCS.values() for _, name, *_ in docs.MARKED.findall(text)}
    assert used == set(docs.PARTS)


def test_a_stale_part_is_found_and_an_unknown_one_refused():
    stale = "<!-- generated: symbols -->\nold\n<!-- end -->"
    assert docs.refreshed(stale) != stale
    assert docs.refreshed(docs.refreshed(stale)) == docs.refreshed(stale)
    with pytest.raises(docs.PluginError, match="'nothing'"):
        docs.refreshed("<!-- generated: nothing -->\n<!-- end -->")


def test_every_hook_is_documented():
    names = [name for name in vars(hookspecs) if name.startswith("register_")]
    assert len(names) == 3
    for name in names:
        assert f"### {name}\n" in DOCS["docs/hooks.md"]


def test_every_option_is_documented():
    options: list[click.Parameter] = []
    for style in ("short", "long"):
        options += conversion.convert_command(style).params
    group = cli.command()
    ctx = click.Context(group)
    for command in map(partial(group.get_command, ctx), group.list_commands(ctx)):
        options += command.params
    for entry in registry.entries().values():
        if entry.distribution == "ckptx" and entry.kind != "schema":
            options += getattr(registry, entry.kind)(entry.name).options()
    shown = [option for option in options if not getattr(option, "hidden", False)]
    spellings = {word for option in shown for word in option.opts if word.startswith("--")}
    assert "--pipeline-model-parallel-layout" in spellings
    assert [word for word in sorted(spellings) if word not in DOCS["docs/cli.md"]] == []


def test_every_message_key_and_symbol_is_documented():
    page = DOCS["docs/protocol.md"]
    for message, keys in canonical_names.MESSAGES.items():
        assert f"### {message}\n" in page
        for key in keys:
            assert f"`{key.name}`" in page
            assert set(key.shape) <= set(canonical_names.SYMBOLS)
    for kind in ("Begin", "Tensors", "End"):
        assert hasattr(messages, kind)
        assert f"### {kind}\n" in page


def test_every_plugin_and_family_is_in_the_support_matrix():
    for entry in registry.entries().values():
        if entry.distribution == "ckptx" and entry.kind != "schema":
            assert f"`{entry.name}" in DOCS["README.md"]
    for name, family in registry.families().items():
        assert f"| {name} |" in DOCS["README.md"] or not family.layouts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", DOCS)
def test_no_path_of_a_machine_appears(name):
    found = re.findall(r"(?<![\w.~])/(?:home|root|tmp|work|mnt|data|Users|var)/\S*", DOCS[name])
    assert found == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in navigation


def test_every_option_of_megatrons_converter_is_explained():
    # NVIDIA/Megatron-LM:tools/checkpoint/{convert,loader_*,saver_*}.py@core_v0.12.3, add_argument
    theirs = """
        bf16 checkpoint-type fp16 load-dir loader loader-transformer-impl
        make-vocab-size-divisible-by max-queue-size megatron-path model-size model-type no-checking
        position-embedding-type save-dir saver saver-transformer-impl
        target-expert-parallel-size target-pipeline-parallel-size target-tensor-parallel-size
        tokenizer-model true-vocab-size vit-dummy-head-count vocab-file
    """
    page = DOCS["docs/from-megatron.md"]
    assert [name for name in theirs.split() if f"`--{name}`" not in page] == []


def test_options_called_accepted_are_accepted():
    command = conversion.convert_command("long")
    known = {word for option in command.params for word in option.opts}
    plugins = [("loader", name) for name in ("core", "legacy", "llama_mistral", "llava")]
    for kind, name in (*plugins, ("saver", "core"), ("saver", "legacy")):
        known |= {word for o in getattr(registry, kind)(name).options() for word in o.opts}
    rows = re.findall(
        r"^\| (`--.*?) \|.*\| (\w[\w ]*) \|$", DOCS["docs/from-megatron.md"], re.MULTILINE
    )
    assert len(rows) > 15
    for options, verdict in rows:
        for option in re.findall(r"`(--[\w-]+)`", options):
            expected = verdict in ("accepted", "ignored")
            assert (option in known) == expected, (option, verdict)


def make_llama(directory: Path) -> None:
    """Write a Llama of two layers and a half kilobyte, by hand."""
    hidden, ffn, vocabulary_size, layers = 16, 24, 37, 4
    shapes = {
        "model.embed_tokens.weight": (vocabulary_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary_size, hidden),
    }
    for layer in range(layers):
        own = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    }
    directory.mkdir()
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["docs/index.md"])  # test_commands.py runs the others
def test_shell_blocks_run(name, tmp_path):
    """Every command of a page, in order, on a tiny model in an empty directory."""
    make_llama(tmp_path / "llama")
    shown = commands(DOCS[name])
    assert shown
    for words in shown:
        match words:
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
                continue
            case ["ckptx", *rest]:
                run = ["-c", "from ckptx.cli.main import main; main()", *rest]
            case ["python", "convert.py", *rest]:
                run = [str(ROOT / "convert.py"), *rest]
            case _:
                raise AssertionError(f"{shlex.join(words)}: neither ckptx nor convert.py")
        done = subprocess.run(
            [sys.executable, *run], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_python_examples_run(tmp_path, monkeypatch):
    """The page on Python, from top to bottom, beside a tiny model."""
    make_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS["docs/python.md"], re.DOTALL)
    assert len(blocks) > 5
    (tmp_path / "examples.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "examples.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'tpp' is no option here; did you mean 'tp'?" in done.stdout
    assert "equal: " in done.stdout


def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
