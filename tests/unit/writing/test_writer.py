"""The writer, against bytes that numpy lays out in memory."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ckptx.errors import ConversionError
from ckptx.protocol.contracts import SavePlan
from ckptx.storage.file_plan import Crc32, FilePlan, Region
from ckptx.tensors.joins import concat, interleave
from ckptx.tensors.lazy import Filled, LazyTensor, replicated, stored
from ckptx.writing import output_files, writer
from ckptx.writing.journal import Identity, Journal
from ckptx.writing.journal import read as read_journal
from ckptx.writing.leaves import LEAF
from ckptx.writing.writer import WriteOptions, execute

RNG = np.random.default_rng(3)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def no_thread_and_no_descriptor_is_left() -> Iterator[None]:
    threads, files = threading.active_count(), open_files()
    yield
    assert threading.active_count() == threads
    assert open_files() == files


def file_of(path: str, *contents: LazyTensor | bytes | Crc32) -> FilePlan:
    regions: list[Region] = []
    end = 0
    for number, content in enumerate(contents):
        match content:
            case bytes():
                size = len(content)
            case Crc32():
                size = 4
            case _:
                size = content.nbytes
        regions.append(Region(end, size, content, f"tensor {number}"))
        end += size
    return FilePlan(path, end, regions)


def put(path: Path, array: np.ndarray, head: bytes = b"") -> str:
    path.write_bytes(head + array.tobytes())
    return str(path)


def run(plan: SavePlan, files: list[str], target: Path, **options: object) -> writer.Written:
    target.mkdir()
    return execute(plan, files, target, WriteOptions(**options))  # type: ignore[arg-type]


def leaf_digest(data: bytes) -> str:
    leaves = [xxhash.xxh3_128_digest(data[at : at + LEAF]) for at in range(0, len(data), LEAF)]
    return "xxh3_128:" + xxhash.xxh3_128_hexdigest(b"".join(leaves))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavePlan, list[str], dict[str, bytes]]:
    """Return a plan of fused, gated and column-cut weights above a leaf, and its files' bytes."""
    folder = tmp_path_factory.mktemp("source")
    q = RNG.integers(0, 2**16, (1024, 3000), np.uint16)
    k, v = (RNG.integers(0, 2**16, (256, 3000), np.uint16) for _ in range(2))
    down = RNG.integers(0, 2**16, (3000, 1600), np.uint16)
    norm = RNG.integers(0, 2**16, 3000, np.uint16)
    paths, lazy = [], []
    for number, array in enumerate((q, k, v, down, norm)):
        paths.append(put(folder / str(number), array, head=b"x" * (number * 3)))
        lazy.append(stored(number, number * 3, "uint16", array.shape))
    fused = interleave(lazy[:3], 4)
    rows = [a.reshape(4, -1, 3000) for a in (q, k, v)]
    expected_fused = np.concatenate(rows, 1).reshape(-1, 3000)
    files, expected = [], {}
    for rank in range(8):
        path = f"mp_rank_{rank:02}/model.pt"
        column, part = lazy[3].chunk(1, 8, rank), fused.chunk(0, 4, rank % 4)
        files.append(file_of(path, b"head%d" % rank, column, Crc32(1), part, lazy[4], Crc32(4)))
        tail = norm.tobytes()
        cut = down[:, rank * 200 : (rank + 1) * 200].tobytes()
        block = expected_fused[rank % 4 * 384 : (rank % 4 + 1) * 384].tobytes()
        sums = [zlib.crc32(data).to_bytes(4, "little") for data in (cut, tail)]
        expected[path] = b"head%d" % rank + cut + sums[0] + block + tail + sums[1]
    whole = concat([fused, Filled("uint16", (7, 3000))]).permute((1, 0))
    files.append(file_of("all/turned", whole, Crc32(0)))
    turned = np.concatenate([expected_fused, np.zeros((7, 3000), np.uint16)]).T.tobytes()
    expected["all/turned"] = turned + zlib.crc32(turned).to_bytes(4, "little")
    return SavePlan(files), paths, expected


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_files_are_right_byte_for_byte_with_any_number_of_threads(model, tmp_path, threads):
    plan, paths, expected = model
    told: list[int] = []
    options = WriteOptions(threads=threads, max_memory=2 << 30)
    written = execute(plan, paths, tmp_path, options, told.append)
    for path, content in expected.items():
        assert (tmp_path / path).read_bytes() == content
    regions = {f.path: {n: r for n, r in enumerate(f.regions)} for f in plan.files}
    assert written.digests == {
        path: {
            number: leaf_digest(content[region.offset : region.offset + region.size])
            for number, region in regions[path].items()
            if isinstance(region.content, LazyTensor)
        }
        for path, content in expected.items()
    }
    assert sum(told) == sum(
        r.size for f in plan.files for r in f.regions if not isinstance(r.content, Crc32)
    )


def test_sha256_digests_are_of_leaves(tmp_path):
    data = RNG.integers(0, 256, LEAF + 5, np.uint8)
    plan = SavePlan([file_of("x", stored(0, 0, "uint8", data.shape))])
    written = run(plan, [put(tmp_path / "in", data)], tmp_path / "out", digest="sha256")
    leaves = [hashlib.sha256(data[s].tobytes()).digest() for s in (slice(LEAF), slice(LEAF, None))]
    assert written.digests["x"] == {0: "sha256:" + hashlib.sha256(b"".join(leaves)).hexdigest()}


def test_empty_tensors_and_files(tmp_path):
    source = put(tmp_path / "in", np.zeros(0, np.uint8))
    empty = stored(0, 0, "float32", (0, 4))
    plan = SavePlan(
        [file_of("nothing"), file_of("empty", empty), file_of("sum", empty, b"!", Crc32(0))]
    )
    written = run(plan, [source], tmp_path / "out")
    found = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert found == {"nothing": b"", "empty": b"", "sum": b"!" + bytes(4)}
    nothing = "xxh3_128:" + xxhash.xxh3_128_hexdigest(b"")
    assert written.digests == {"nothing": {}, "empty": {0: nothing}, "sum": {0: nothing}}


@pytest.mark.parametrize(("allowed", "kept"), [(200, 20), (128, 0)])
def test_more_files_than_are_kept_open(tmp_path, monkeypatch, allowed, kept):
    if kept:
        monkeypatch.setattr(output_files, "_MAX_OPEN", kept)
        monkeypatch.setattr("ckptx.storage.open_files._MAX_OPEN", kept)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    data = RNG.integers(0, 256, (600, 3), np.uint8)
    paths = [put(tmp_path / f"in{n}", row) for n, row in enumerate(data)]
    plan = SavePlan([file_of(f"{n}", stored(n, 0, "uint8", (3,))) for n in range(600)])
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, old[1]))
    try:
        run(plan, paths, tmp_path / "out", threads=4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert all((tmp_path / "out" / f"{n}").read_bytes() == data[n].tobytes() for n in range(600))


def test_many_small_tensors_of_one_file(tmp_path):
    data = RNG.integers(0, 256, 5000, np.uint8)
    parts = [stored(0, int(at), "uint8", (1,)) for at in RNG.permutation(5000)]
    run(SavePlan([file_of("x", *parts)]), [put(tmp_path / "in", data)], tmp_path / "out")
    order = [part.offset for part in parts]
    assert (tmp_path / "out/x").read_bytes() == data[order].tobytes()


def big(tmp_path: Path, count: int = 12) -> tuple[SavePlan, list[str]]:
    """Return a plan of several batches from one file per tensor."""
    shape = (count, LEAF)
    paths = [put(tmp_path / f"in{n}", np.full(LEAF, n, np.uint8)) for n in range(count)]
    return SavePlan(
        [file_of(f"{n}", stored(n, 0, "uint8", shape[1:])) for n in range(count)]
    ), paths


def test_a_source_that_is_too_short(tmp_path):
    plan, paths = big(tmp_path)
    os.truncate(paths[7], 1000)
    with pytest.raises(ConversionError, match=r"in7: ends at byte 1000, expected .* 4194304"):
        run(plan, paths, tmp_path / "out")


def test_a_source_that_is_not_there(tmp_path):
    plan, paths = big(tmp_path)
    Path(paths[3]).unlink()
    with pytest.raises(ConversionError, match=r"in3: cannot be read: No such file"):
        run(plan, paths, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.utime(path, (1, 1)), "in9: changed while it was converted"),
        (lambda path: path.replace(path.with_name("in8")), "in8: changed|in9: cannot"),
        (lambda path: path.unlink(), "in9: cannot be (opened|read)"),
        (lambda path: os.truncate(path, 10), "in9: ends at byte 10"),
    ],
    ids=["touched", "moved", "removed", "cut"],
)
def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch, change, message):
    plan, paths = big(tmp_path)
    create, done = writer.create, []

    def creating(*args):
        if not done:
            done.append(change(Path(paths[9])))
        return create(*args)

    monkeypatch.setattr(writer, "create", creating)
    with pytest.raises(ConversionError, match=message):
        run(plan, paths, tmp_path / "out", threads=1)


def test_replicas_are_compared_before_anything_is_written(tmp_path):
    ones = put(tmp_path / "a", np.ones(9, np.uint8)), put(tmp_path / "b", np.zeros(9, np.uint8))
    copies = replicated([stored(0, 0, "uint8", (9,)), stored(1, 0, "uint8", (9,))])
    plan = SavePlan([file_of("x", copies)])
    with pytest.raises(ConversionError, match="copy 1 of 2 differs"):
        run(plan, list(ones), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    written = run(plan, list(ones), tmp_path / "took", check_replicas="none")
    assert written.replicas == 0
    assert (tmp_path / "took/x").read_bytes() == b"\1" * 9


def test_short_writes_are_continued(tmp_path, monkeypatch):
    data = RNG.integers(0, 256, 3 * LEAF + 17, np.uint8)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[: 1 << 20 | 1], at))
    plan = SavePlan([file_of("x", b"h" * (LEAF + 1), stored(0, 0, "uint8", data.shape))])
    run(plan, [put(tmp_path / "in", data)], tmp_path / "out")
    assert (tmp_path / "out/x").read_bytes() == b"h" * (LEAF + 1) + data.tobytes()


def test_short_reads_are_continued(tmp_path, monkeypatch):
    data = RNG.integers(0, 256, LEAF + 17, np.uint8)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:99999]], at))
    plan = SavePlan([file_of("x", stored(0, 0, "uint8", data.shape))])
    run(plan, [put(tmp_path / "in", data)], tmp_path / "out")
    assert (tmp_path / "out/x").read_bytes() == data.tobytes()


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_stops_every_thread_and_names_the_file(tmp_path, monkeypatch, call):
    plan, paths = big(tmp_path, 30)
    real, calls, lock = getattr(os, call), [], threading.Lock()

    def failing(*args):
        with lock:
            calls.append(args)
            if len(calls) > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ConversionError, match=r"out/\d+: .*No space left .*; free space"):
        run(plan, paths, tmp_path / "out", threads=3)


def test_descriptors_stay_open_until_the_last_thread_is_done(tmp_path, monkeypatch):
    """A thread that still writes after a failure must not meet a descriptor that became another."""
    plan, paths = big(tmp_path, 30)
    pwrite, bad, first = os.pwrite, [], threading.Event()

    def slow(descriptor, view, at):
        if not first.is_set():
            first.set()
            raise OSError(errno.EIO, "broken")
        time.sleep(0.05)
        try:
            return pwrite(descriptor, view, at)
        except OSError as error:
            bad.append(error)
            raise

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(ConversionError, match="broken"):
        run(plan, paths, tmp_path / "out", threads=3, max_memory=2 << 30)
    assert not bad


def test_an_existing_file_is_not_written_over(tmp_path):
    plan = SavePlan([file_of("x", b"new")])
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ConversionError, match=r"x: cannot be written: File exists"):
        execute(plan, [], tmp_path, WriteOptions())
    assert (tmp_path / "x").read_bytes() == b"old"


_ROW_PARALLEL = """
    import os, resource, sys
    from pathlib import Path
    from ckptx.tensors.lazy import stored
    from ckptx.storage.file_plan import FilePlan, Region
    from ckptx.protocol.contracts import SavePlan
    from ckptx.writing.writer import WriteOptions, execute

    source, target, cap = sys.argv[1:]
    weight = stored(0, 0, "bfloat16", (8192, 12800))
    cuts = [weight.chunk(1, 8, rank) for rank in range(8)]
    files = [FilePlan(str(n), c.nbytes, [Region(0, c.nbytes, c)]) for n, c in enumerate(cuts)]
    if int(cap):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(cap), int(cap)))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    before = peak()
    execute(SavePlan(files), [source], Path(target), WriteOptions(threads=2))
    sys.stdout.write(str(peak() - before))
"""


@pytest.fixture
def weight(tmp_path: Path) -> Path:
    """Return 200 MiB of zeros that take no disk, but for one row."""
    path = tmp_path / "weight"
    with path.open("wb") as file:
        file.truncate(8192 * 12800 * 2)
        file.seek(5000 * 12800 * 2)
        file.write(bytes(range(200)) * 128)
    return path


def row_parallel(weight: Path, target: Path, cap: int) -> subprocess.CompletedProcess[str]:
    target.mkdir()
    script = textwrap.dedent(_ROW_PARALLEL)
    return subprocess.run(
        [sys.executable, "-c", script, weight, target, str(cap)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_memory_does_not_grow_with_the_checkpoint(weight, tmp_path):
    done = row_parallel(weight, tmp_path / "out", 0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 170 << 20
    row = (bytes(range(200)) * 128)[3200 * 3 : 3200 * 4]
    found = (tmp_path / "out/3").read_bytes()
    assert found[5000 * 3200 : 5001 * 3200] == row
    assert found.count(0) >= len(found) - 3200


def test_a_limit_on_file_size_is_an_error_like_any_other(weight, tmp_path):
    done = row_parallel(weight, tmp_path / "out", 1 << 20)
    assert done.returncode == 1
    assert "CutShortError" in done.stderr
    assert "out/0: cannot be written: File too large" in done.stderr


def test_nothing_is_recorded_before_it_is_on_disk(tmp_path, monkeypatch):
    """At every record of the journal, all that it names was synced after it was written."""
    files, leaves = 3, 4
    source = np.arange(files * leaves * LEAF, dtype=np.uint8)
    paths = [put(tmp_path / "source", source)]
    plan = SavePlan(
        [
            file_of(f"{number}.bin", stored(0, number * leaves * LEAF, "uint8", (leaves * LEAF,)))
            for number in range(files)
        ]
    )
    staging = tmp_path / "new"
    staging.mkdir()
    lock, written, durable, records = threading.Lock(), [], set(), []
    write, sync, flush = os.pwrite, os.fsync, os.fdatasync

    def noted_write(descriptor: int, data: bytes, offset: int) -> int:
        count = write(descriptor, data, offset)
        with lock:
            written.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset))
        return count

    def noted_sync(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        with lock:
            before = [one for one in written if one[0] == path]
        if path == str(tmp_path / "journal"):
            found = read_journal(tmp_path / "journal")
            assert found is not None
            records.append(len(found.leaves))
            for leaf in found.leaves:
                home, place = divmod(leaf, leaves)
                assert (str(staging / f"{home}.bin"), place * LEAF) in durable, leaf
        (flush if path == str(tmp_path / "journal") else sync)(descriptor)
        durable.update(before)

    monkeypatch.setattr(os, "pwrite", noted_write)
    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "fdatasync", noted_sync)
    identity = Identity("plan", "sources", "versions", "xxh3_128")
    with Journal(tmp_path / "journal", identity, LEAF) as journal:
        execute(plan, paths, staging, WriteOptions(threads=2), journal=journal)
    assert len(records) > 2
    assert records[-1] == files * leaves
