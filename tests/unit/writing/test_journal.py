from __future__ import annotations

from pathlib import Path

import pytest

from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.tensors.lazy import stored
from ckptx.writing import journal
from ckptx.writing.journal import Identity, Journal

MINE = Identity("plan", "sources", "ckptx 1", "xxh3_128")


def written(path: Path, count: int = 3) -> list[int]:
    """Write a journal; return its size after each record."""
    sizes = []
    with Journal(path, MINE) as one:
        for number in range(count):
            one.record({number: bytes([number]) * 16, number + 100: b"x" * 16}, 10 * (number + 1))
            sizes.append(path.stat().st_size)
    return sizes


def test_every_cut_leaves_what_was_whole(tmp_path):
    path = tmp_path / "journal"
    sizes = written(path)
    content = path.read_bytes()
    head = sizes[0] - (sizes[1] - sizes[0])
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        found = journal.read(path)
        if end < head:
            assert found is None
            continue
        assert found is not None
        whole = sum(end >= size for size in sizes)
        assert found.durable == 10 * whole
        assert sorted(found.leaves) == sorted([*range(whole), *range(100, 100 + whole)])


def test_every_flipped_bit_ends_the_journal_there(tmp_path):
    path = tmp_path / "journal"
    sizes = written(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        found = journal.read(path)
        whole = sum(place >= size for size in sizes)
        assert (0 if found is None else found.durable) == 10 * whole


def test_tail_of_zeros_as_after_a_power_cut(tmp_path):
    path = tmp_path / "journal"
    written(path)
    path.write_bytes(path.read_bytes() + bytes(5000))
    found = journal.read(path)
    assert found is not None
    assert found.durable == 30
    with Journal(path, MINE) as again:
        again.record({7: b"y" * 16}, 40)
    found = journal.read(path)
    assert found is not None
    assert found.durable == 40
    assert found.leaves[7] == b"y" * 16
    assert found.leaves[0] == bytes(16)


def test_journal_of_another_conversion_is_begun_anew(tmp_path):
    path = tmp_path / "journal"
    written(path)
    other = Identity("another", "sources", "ckptx 1", "xxh3_128")
    assert MINE.difference(other) == "it was started with other options"
    with Journal(path, other) as one:
        assert not one.leaves
    found = journal.read(path)
    assert found is not None
    assert (found.identity, found.durable) == (other, 0)


def test_journal_follows_no_link(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "journal").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"), Journal(tmp_path / "journal", MINE):
        pass
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_writer_that_has_not_ended_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_PATIENCE", 0.1)
    with (
        Journal(tmp_path / "journal", MINE),
        pytest.raises(journal.ConversionError, match="has not ended"),
        Journal(tmp_path / "journal", MINE),
    ):
        pass


def test_identity_sees_every_part_of_a_plan_and_of_its_sources(tmp_path):
    def plan(name: str = "x", offset: int = 0, **more: object) -> SavePlan:
        tensor = stored(0, offset, "".join(["uint", "8"]), (4,))
        return SavePlan([FilePlan("f", 4, [Region(0, 4, tensor, name)])], **more)

    def identity(one: SavePlan, size: int = 4, version: str = "1", files: str = "ab") -> Identity:
        states = {"/a": (1, size, 2, 3), "/b": (2, 4, 2, 3)}
        return journal.identify(
            one, [f"/{name}" for name in files], states, {"ckptx": version}, "sha256"
        )

    mine = identity(plan())
    assert mine == identity(plan())
    others = [plan("y"), plan(offset=1), plan(directory="d"), plan(pointers={"p": b"1"})]
    for other in (
        *(identity(one) for one in others),
        identity(plan(), 5),
        identity(plan(), 4, "2"),
        identity(plan(), files="ba"),
    ):
        assert mine.difference(other)


def test_links_are_not_followed_where_a_run_goes_on(tmp_path):
    from ckptx.writing.atomic import keep_only

    root, away = tmp_path / "new", tmp_path / "away"
    (root / "a").mkdir(parents=True)
    away.mkdir()
    for path in (root / "a/kept", root / "a/extra", away / "theirs"):
        path.write_bytes(b"1")
    (root / "b").symlink_to(away)
    (root / "c").symlink_to(away / "theirs")
    (root / "empty").mkdir()
    keep_only(root, {"a/kept", "b/theirs", "c"})
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*")) == ["a", "a/kept"]
    assert [path.name for path in away.iterdir()] == ["theirs"]
