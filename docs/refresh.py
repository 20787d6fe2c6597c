"""Refresh the generated parts of the documentation of a checkout.

    python -m docs.refresh            rewrite them
    python -m docs.refresh --check    write nothing; exit 1 if one is out of date

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. What belongs
there is read from the code: plugins, options, hooks, messages. Only ckptx's own plugins count,
whatever else is installed.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ckptx.cli import conversion
from ckptx.cli import main as cli
from ckptx.errors import CkptxError, PluginError
from ckptx.model import canonical_names as vocabulary
from ckptx.model.family import Family
from ckptx.protocol import context, declarations, hookspecs
from ckptx.protocol import contracts as plugin
from ckptx.protocol import messages as protocol
from ckptx.registry import registry
from ckptx.verification.diagnosis.search import KNOWN

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "tests" / "versions.json"
MARKED = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 80
"""Columns of the help texts."""

FROM_HF, TO_HF = "tests/interop/test_hf_to_core.py", "tests/interop/test_core_to_hf.py"
META, LEGACY = "tests/interop/test_meta.py", "tests/interop/test_legacy.py"
SEEING = "tests/interop/test_llava.py"
"""Compares logits and ranks of models of several parts."""
LOGITS_FAMILIES = (
    "tests/interop/conversion.py",
    "tests/interop/experts.py",
    "tests/interop/test_dense_families.py",
    "tests/interop/test_experts.py",
    "tests/interop/test_bert.py",
)
"""Name the families whose logits are compared, as ``hf.llama`` or by their class."""

PROOFS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("hf", "load"): ("L", FROM_HF),
    ("hf", "save"): ("L", TO_HF),
    ("core torch_dist", "load"): ("L", TO_HF),
    ("core torch_dist", "save"): ("L", FROM_HF),
    ("core torch", "load"): ("L", TO_HF),
    ("core torch", "save"): ("L", FROM_HF),
    ("meta", "load"): ("R", META),
    ("meta", "save"): ("R", META),
    ("legacy", "load"): ("M", LEGACY),
    ("legacy", "save"): ("M", LEGACY),
    ("dcp", "load"): ("P", "tests/interop/test_dcp.py"),
    ("dcp", "save"): ("P", "tests/interop/test_dcp.py"),
    ("deepspeed", "load"): ("D", "tests/formats/test_deepspeed.py"),
    ("verl", "load"): ("P", "tests/interop/test_verl.py"),
    ("peft", "load"): ("A", "tests/interop/test_lora.py"),
    ("rlinf", "load"): ("P", "tests/interop/test_rlinf.py"),
    ("pytorch", "load"): ("P", "tests/formats/test_pytorch.py"),
    ("pytorch", "save"): ("P", "tests/formats/test_pytorch.py"),
}
"""By column of the support matrix and direction: a letter, and the tests that show it."""

LEGEND = {
    "L": "transformers and real megatron-core, on either side of the conversion, compute the same "
    "logits (`tests/interop`)",
    "T": "transformers loads what went through ckptx and computes the same logits as before "
    "(`tests/interop`)",
    "R": "transformers, real megatron-core and the publisher's own model, written anew in eager "
    "torch for the tests, compute the same logits (`tests/interop`)",
    "M": "transformers and Megatron's legacy model, written anew in eager torch for the tests, "
    "compute the same logits (`tests/interop`); so did the original",
    "P": "torch itself is on the other side (`tests/formats`, `tests/interop/test_dcp.py`, "
    "`tests/interop/test_verl.py`, `tests/interop/test_rlinf.py`)",
    "D": "DeepSpeed has written the checkpoints, and gathered the weights that the result is "
    "compared with, bit for bit (`tests/golden/deepspeed`)",
    "A": "peft has made the adapters, and merged them into what the result is compared with, bit "
    "for bit (`tests/interop/test_lora.py`)",
    "K": "the conformance kit, with models made by hand (`tests/formats`, `tests/schemas`)",
}
"""What the letters say."""


def documents(root: Path = ROOT) -> list[Path]:
    """Return the documents of a checkout."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def refreshed(text: str, place: str = "text") -> str:
    """Return a document with its generated parts made anew.

    Raises:
        PluginError: it asks for a part that nothing generates.
    """

    def part(match: re.Match[str]) -> str:
        name = match[2]
        if name not in PARTS:
            raise PluginError(f"{place}: no part is called {name!r}; known: {', '.join(PARTS)}")
        return f"{match[1]}{PARTS[name]().rstrip()}\n{match[4]}"

    return MARKED.sub(part, text)


def main(args: Sequence[str] | None = None) -> int:
    """Refresh the documents, or with ``--check`` name those that are out of date."""
    args = list(sys.argv[1:] if args is None else args)
    if not set(args) <= {"--check"}:
        click.echo("usage: python -m docs.refresh [--check]", err=True)
        return 2
    if not (ROOT / "mkdocs.yml").is_file():
        click.echo(f"error: {ROOT}: no checkout of ckptx, so no documents to refresh", err=True)
        return 1
    os.environ[registry.PIN] = "ckptx"
    registry.entries.cache_clear()
    registry.families.cache_clear()
    stale, broken = [], False
    for path in documents():
        old = path.read_text()
        try:
            new = refreshed(old, str(path.relative_to(ROOT)))
        except CkptxError as error:
            click.echo(f"error: {error}", err=True)
            broken = True
            continue
        if new != old:
            stale.append(path)
            if not args:
                path.write_text(new)
    for path in stale:
        click.echo(f"{'out of date' if args else 'refreshed'}: {path.relative_to(ROOT)}")
    if args and stale:
        click.echo("run: python -m docs.refresh", err=True)
    return int(broken or bool(args and stale))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def support_matrix() -> str:
    """Return which family goes in and out of which format, and what proves it."""
    columns = list(_columns())
    rows = []
    for family in (family for family in registry.families().values() if family.layouts):
        cells = [_cell(family, *column) for column in columns]
        rows.append([family.name, ", ".join(family.architectures), *cells])
    head = ["family", "architecture", *(f"`{column[0]}`" for column in columns)]
    used = {letter for row in rows for cell in row[2:] for letter in re.findall(r" (\w)", cell)}
    legend = [f"- {letter}: {text}" for letter, text in LEGEND.items() if letter in used]
    limits = [
        f"- {family.name}: {line}"
        for family in registry.families().values()
        for line in (*dict.fromkeys(family.refused.values()), *family.limits)
    ]
    return "\n".join(
        [table(head, rows), "", *legend, "", "What is not converted, and why:", "", *limits]
    )


def _columns() -> Iterator[tuple[str, Mapping[str, Mapping[str, Any]]]]:
    """Yield each format with what its loader and saver can do, as ``load`` and ``save``."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for status in registry.statuses():
        if status.entry.kind != "schema" and status.capabilities.get("layouts"):
            direction = "load" if status.entry.kind == "loader" else "save"
            found.setdefault(status.entry.name, {})[direction] = status.capabilities
    for name in sorted(found, key=lambda name: (name != "hf", name)):
        # The forms of Megatron Core differ in more than their container.
        forms = found[name]["save"]["formats"] if name == "core" else [""]
        for form in forms:
            yield f"{name} {form}".strip(), found[name]


def _cell(family: Family, column: str, directions: Mapping[str, Mapping[str, Any]]) -> str:
    words = [
        f"{direction} {_proof(family, column, direction)}"
        for direction, capabilities in directions.items()
        if set(capabilities.get("layouts", ())) & set(family.layouts)
    ]
    return ", ".join(words) or "-"


def _proof(family: Family, column: str, direction: str) -> str:
    letter, tests = PROOFS.get((column, direction), ("K", ""))
    shown = (ROOT / tests).is_file()
    if family.composition is not None and letter == "L":
        return letter if (ROOT / SEEING).is_file() else "K"
    named = "|".join(rf"\b{name}\b" for name in (f"hf\\.{family.name}", *family.architectures))
    if letter in ("L", "R", "M"):
        texts = [(ROOT / path).read_text() for path in LOGITS_FAMILIES if (ROOT / path).is_file()]
        shown = shown and any(re.search(named, text) for text in texts)
        letter = letter if "mcore" in family.layouts or letter == "R" else "T"
    return letter if shown else "K"


def commands() -> str:
    """Return the help of every command, without plugins."""
    group = cli.command()
    parent = group.make_context("ckptx", [], resilient_parsing=True, terminal_width=WIDTH)
    blocks = [_help("ckptx", parent.get_help())]
    for name in cli.COMMANDS:
        command = group.get_command(parent, name)
        assert command is not None
        context = command.make_context(name, [], parent=parent, resilient_parsing=True)
        blocks.append(_help(f"ckptx {name}", context.get_help()))
    long = conversion.convert_command("long")
    long.context_settings = {"help_option_names": ["-h", "--help"]}
    context = long.make_context("convert.py", [], resilient_parsing=True, terminal_width=WIDTH)
    blocks.append(_help("convert.py", context.get_help()))
    return "\n\n".join(blocks)


def _help(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```"


def plugin_options() -> str:
    """Return the options of every loader and saver."""
    blocks = []
    for kind in ("loader", "saver"):
        for name in registry.names("loader" if kind == "loader" else "saver"):
            chosen = registry.loader(name) if kind == "loader" else registry.saver(name)
            context = click.Context(click.Command(name))
            rows = [record for o in chosen.options() if (record := o.get_help_record(context))]
            text = table(("option", "meaning"), [(f"`{o}`", " ".join(h.split())) for o, h in rows])
            blocks.append(f"### {kind} {name}\n\n{text if rows else 'None.'}")
    return "\n\n".join(blocks)


def hooks() -> str:
    """Return the hooks with their signatures and descriptions."""
    blocks = []
    for name, hook in vars(hookspecs).items():
        if hasattr(hook, f"{hookspecs.PROJECT}_spec"):
            signature = f"{name}{inspect.signature(hook)}".replace(" -> 'None'", "").replace(
                "'", ""
            )
            blocks.append(f"### {name}\n\n```python\n{signature}\n```\n\n{_doc(hook)}")
    return "\n\n".join(blocks)


def contracts() -> str:
    """Return what a loader and a saver must have, and what a side file is."""
    return "\n\n".join(_class(plugin, name) for name in ("Loader", "Saver", "SideFile"))


def engine_values() -> str:
    """Return what the engine tells every plugin, and what a plugin declares."""
    return "\n\n".join((_class(context, "Context"), _class(declarations, "Format")))


def messages() -> str:
    """Return the messages of the protocol and their fields."""
    names = ("Begin", "Tensors", "End", "SourceTensor", "Dropped")
    return "\n\n".join(_class(protocol, name) for name in names)


def canonical_names() -> str:
    """Return the messages of the vocabulary and the keys of each."""
    blocks = []
    others = (
        (f"{vocabulary.LAYER}N, where it is a mixture of experts", vocabulary.EXPERTS),
        ("vit embeddings, of RADIO", vocabulary.RADIO),
    )
    for message, keys in (*vocabulary.MESSAGES.items(), *others):
        rows = [
            (
                f"`{key.name}`",
                f"[{', '.join(key.shape)}]",
                "-" if key.tp is None else str(key.tp),
                key.meaning + (", never cast" if key.pinned else ""),
                str(key.since),
            )
            for key in keys
        ]
        head = ("key", "shape", "TP axis", "meaning", "since")
        blocks.append(f"### {message}\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


def symbols() -> str:
    """Return what the symbols in shapes stand for."""
    rows = ((f"`{name}`", meaning) for name, meaning in vocabulary.SYMBOLS.items())
    return table(("symbol", "elements"), rows)


def recognised() -> str:
    """Return the formats that ckptx knows of and does not convert yet."""
    names: dict[str, list[str]] = {}
    for name, what in registry.RECOGNISED.items():
        names.setdefault(what, []).append(f"`{name}`")
    lines = "; ".join(f"{what} ({', '.join(found)})" for what, found in names.items())
    return f"{lines}."


def versions() -> str:
    """Return tables of what every release of a framework did, from ``make versions``."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(VERSIONS.read_text())
    parts = []
    for framework, releases in found.items():
        cells = list(dict.fromkeys(cell for said in releases.values() for cell in said))
        rows = [
            (version, *(said.get(cell, "-").replace("|", "/") for cell in cells))
            for version, said in releases.items()
        ]
        parts.append(f"## {framework}\n\n{table((framework, *cells), rows)}")
    return "\n\n".join(parts)


def diagnoses() -> str:
    """Return the mistakes that ``verify`` knows, and what to do about each."""
    return table(
        ("name", "what has happened", "what to do"),
        ((f"`{name}`", words.title, words.advice) for name, words in KNOWN.items()),
    )


def example(pattern: str, language: str, *, tests: bool = False) -> Callable[[], str]:
    """Return what shows the files of the example package that a pattern matches."""

    def show() -> str:
        folder = ROOT / "examples" / "ckptx-npz"
        paths = {path.relative_to(folder): path for path in sorted(folder.rglob(pattern))}
        found = {
            name: path.read_text().rstrip()
            for name, path in paths.items()
            if ("tests" in name.parts) == tests and "build" not in name.parts
        }
        if not found:
            raise PluginError(f"{folder}: holds no {pattern}, which the documents show")
        return "\n\n".join(
            f"`{name}`:\n\n```{language}\n{text}\n```" for name, text in found.items() if text
        )

    return show


PARTS: Mapping[str, Callable[[], str]] = {
    "support-matrix": support_matrix,
    "commands": commands,
    "plugin-options": plugin_options,
    "hooks": hooks,
    "contracts": contracts,
    "engine-values": engine_values,
    "messages": messages,
    "vocabulary": canonical_names,
    "symbols": symbols,
    "recognised": recognised,
    "versions": versions,
    "diagnoses": diagnoses,
    "example-pyproject": example("pyproject.toml", "toml"),
    "example-module": example("*.py", "python"),
    "example-test": example("test_*.py", "python", tests=True),
}
"""The generated parts by name."""


def _class(module: object, name: str) -> str:
    """Return a class as a section: its docstring, its attributes and methods with theirs."""
    cls = getattr(module, name)
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    rows = []
    for position, entry in enumerate(node.body):
        if isinstance(entry, ast.AnnAssign):
            following = node.body[position + 1] if position + 1 < len(node.body) else None
            rows.append(
                (
                    f"`{ast.unparse(entry.target)}: {ast.unparse(entry.annotation)}`",
                    _said(following),
                )
            )
        elif isinstance(entry, ast.FunctionDef):
            arguments = ast.unparse(entry.args).removeprefix("self").removeprefix(", ")
            signature = (
                f"{entry.name}({arguments}) -> {ast.unparse(entry.returns or ast.Constant(None))}"
            )
            rows.append((f"`{signature}`", _prose(ast.get_docstring(entry) or "")))
    if any(meaning for _, meaning in rows):
        members = table(("member", "meaning"), rows)
    else:
        members = f"Members: {', '.join(member for member, _ in rows)}."
    return f"### {name}\n\n{_doc(cls)}\n\n{members}"


def _said(node: ast.stmt | None) -> str:
    """Return the string that stands after an attribute."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return _prose(str(node.value.value))
    return ""


def _doc(thing: object) -> str:
    """Return a docstring as Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.getdoc(thing) or "")


def _prose(text: str) -> str:
    """Return a docstring as one line of Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
