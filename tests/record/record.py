"""The record: what the program does, recomputed and compared with what is committed.

    python -m tests.record.record --check [--only PATTERN]
    python -m tests.record.record --write [--only PATTERN]

Every observable output has an entry: files of conversions by their hashes, reports, texts and
help as they are printed, errors of bad input with their exit codes. Entries differ from run to run
in nothing; whoever changes one says why in the commit.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from . import files, hostile, resume, texts

LIST = Path(__file__).parent / "list"
MARK = "=== "
KINDS: Mapping[str, Callable[[Callable[[str], bool]], dict[str, str]]] = {
    "files": files.entries,
    "apart": files.entries_apart,
    "texts": texts.entries,
    "help": texts.help_entries,
    "resume": resume.entries,
    "hostile": hostile.entries,
}
"""Each returns the entries that are wanted, and may return others of its kind."""


def read(kind: str) -> dict[str, str]:
    """Return the committed entries of a kind."""
    found: dict[str, str] = {}
    short, long = LIST / f"{kind}.json", LIST / f"{kind}.txt"
    if short.exists():
        found |= json.loads(short.read_text())
    if long.exists():
        for block in long.read_text().split(f"\n{MARK}"):
            name, _, text = block.removeprefix(MARK).partition("\n")
            lines = text.rstrip("\n").split("\n")
            found[name] = "".join(f"{line[1:]}\n" for line in lines)
    return found


def write(kind: str, entries: Mapping[str, str]) -> None:
    """Write the entries of a kind: short ones a line each, texts as blocks."""
    LIST.mkdir(exist_ok=True)
    rows, blocks = [], []
    for name, text in sorted(entries.items()):
        if "\n" in text:
            lines = text.removesuffix("\n").split("\n")
            blocks.append(f"{MARK}{name}\n" + "".join(f"|{line}\n" for line in lines))
        else:
            rows.append(f"{json.dumps(name)}: {json.dumps(text)}")
    for ending, content in (
        ("json", "{\n" + ",\n".join(rows) + "\n}\n" if rows else ""),
        ("txt", "".join(blocks)),
    ):
        path = LIST / f"{kind}.{ending}"
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return every entry that is not as it should be, in words."""
    said = []
    for name in sorted({*expected, *found}):
        old, new = expected.get(name), found.get(name)
        if old == new:
            continue
        if old is None or new is None:
            said.append(f"{name}: {'is new' if old is None else 'is missing'}")
        elif "\n" in old + new:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
            said.append("\n    ".join([f"{name}:", *list(lines)[2:]]))
        else:
            said.append(f"{name}:\n    - {old}\n    + {new}")
    return said


def wanted(kind: str, patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return whether an entry of a kind is meant; a pattern is a glob of ``kind/name``."""
    globs = list(patterns)

    def is_wanted(name: str) -> bool:
        return not globs or any(fnmatchcase(f"{kind}/{name}", one) for one in globs)

    return is_wanted


def check(patterns: Iterable[str] = (), *, renew: bool = False) -> list[str]:
    """Return the differences; with ``renew`` the list is written anew."""
    patterns, said = list(patterns), []
    for kind, compute in KINDS.items():
        if not any(fnmatchcase(kind, one.partition("/")[0]) for one in patterns or ["*"]):
            continue
        started, is_wanted = time.monotonic(), wanted(kind, patterns)
        committed = read(kind)
        expected = {name: text for name, text in committed.items() if is_wanted(name)}
        found = {name: text for name, text in compute(is_wanted).items() if is_wanted(name)}
        if renew:
            kept = {name: text for name, text in committed.items() if not is_wanted(name)}
            if found or kept:
                write(kind, kept | found)
        different = differences(expected, found)
        said += [f"{kind}/{one}" for one in different]
        seconds = time.monotonic() - started
        print(f"{kind}: {len(found)} entries, {len(different)} differ, {seconds:.0f} s", flush=True)  # noqa: T201
    return said


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.record.record")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true", help="compare; exit 1 if anything differs")
    group.add_argument("--write", action="store_true", help="write the list anew")
    parser.add_argument("--only", metavar="PATTERN", action="append", default=[])
    asked = parser.parse_args()
    said = check(asked.only, renew=asked.write)
    for one in said:
        print(one)  # noqa: T201
    return int(bool(said) and asked.check)


if __name__ == "__main__":
    sys.exit(main())
