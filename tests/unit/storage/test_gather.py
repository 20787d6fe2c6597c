"""Reading: what is asked of the operating system, and what happens when it refuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptx.errors import ConversionError
from ckptx.storage import gather as reader
from ckptx.storage import open_files as opening
from ckptx.storage.gather import Gather, read
from ckptx.storage.open_files import Files
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, Stored, stored

SIZE = 3 << 20


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[np.ndarray, str]:
    path = tmp_path / "numbers"
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(data.tobytes())
    return data, str(path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Record the offset and size of every read."""
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def recording(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", recording)
    return calls


def gathered(path: str, *tensors: Stored) -> list[np.ndarray]:
    files = Files([path])
    gather = Gather(files)
    buffers = [np.empty(tensor.nbytes, np.uint8) for tensor in tensors]
    for tensor, buffer in zip(tensors, buffers, strict=True):
        gather.add_range(tensor, 0, tensor.numel, buffer)
    gather.run()
    files.close()
    return buffers


def test_stripes_of_one_weight_share_one_read(numbers, asked):
    data, path = numbers
    weight = stored(0, 0, "uint8", (1024, 3072))
    stripes = [weight.chunk(1, 8, rank) for rank in range(8)]
    found = gathered(path, *stripes)
    assert asked == [(0, SIZE)]
    for rank, stripe in enumerate(found):
        expected = data.reshape(1024, 3072)[:, rank * 384 : (rank + 1) * 384]
        assert np.array_equal(stripe.reshape(1024, 384), expected)


def test_a_run_is_read_straight_into_place(numbers, asked):
    data, path = numbers
    (found,) = gathered(path, stored(0, 7, "uint8", (1 << 20,)))
    assert np.array_equal(found, data[7 : 7 + (1 << 20)])
    assert asked == [(7, 1 << 20)]


def test_long_rows_are_read_without_their_gaps(numbers, asked):
    data, path = numbers
    (found,) = gathered(path, stored(0, 0, "uint8", (3, 1 << 20)).narrow(1, 0, 70_000))
    assert np.array_equal(found.reshape(3, -1), data.reshape(3, -1)[:, :70_000])
    assert asked == [(row << 20, 70_000) for row in range(3)]


def test_short_rows_far_apart_are_read_without_their_gaps(numbers, asked, monkeypatch):
    data, path = numbers
    block = stored(0, 0, "uint8", (3, 1024, 1024)).narrow(1, 5, 9).narrow(2, 0, 10)
    expected = data.reshape(3, 1024, 1024)[:, 5:9, :10]
    monkeypatch.setattr(reader, "_SPARSE", 1 << 19)
    (found,) = gathered(path, block)
    assert np.array_equal(found.reshape(3, 4, 10), expected)
    assert asked == [((plane << 20) + 5 * 1024, 3 * 1024 + 10) for plane in range(3)]


@pytest.mark.parametrize("window", [1, 100, 5000, 1 << 20])
def test_windows_bound_what_one_read_covers(numbers, asked, monkeypatch, window):
    data, path = numbers
    monkeypatch.setattr(reader, "WINDOW", window)
    shape = (12, 8, 16, 64)
    tensor = stored(0, 3, "uint16", shape).permute((2, 0, 3, 1)).narrow(2, 5, 33)
    expected = data[3 : 3 + 2 * 12 * 8 * 16 * 64].view(np.uint16).reshape(shape)
    found = read(tensor, [path])
    assert np.array_equal(found, expected.transpose(2, 0, 3, 1)[:, :, 5:33])
    assert max(size for _, size in asked) <= max(window, 2)


def test_a_repeated_row_is_read_once(numbers, asked):
    data, path = numbers
    found = read(Stored("uint8", (5, 4), 0, 8, (0, 1)), [path])
    assert np.array_equal(found, np.tile(data[8:12], (5, 1)))
    assert sum(size for _, size in asked) == 4


def test_padding_needs_no_file():
    assert read(Filled("float32", (2, 2), 1.5), []).tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_a_box_of_a_tensor_reads_that_box_only(numbers, asked):
    data, path = numbers
    tensor = concat([stored(0, 0, "uint8", (10, 100)), stored(0, 5000, "uint8", (10, 100))])
    found = read(tensor, [path], ((9, 11), (0, 100)))
    assert np.array_equal(found[0], data[900:1000])
    assert np.array_equal(found[1], data[5000:5100])
    assert sum(size for _, size in asked) <= 5100 - 900


def test_a_file_that_ends_early_names_itself_and_both_sizes(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    message = r"short: ends at byte 5, expected data up to byte 8; the file was cut or changed"
    with pytest.raises(ConversionError, match=message):
        read(stored(0, 2, "uint8", (6,)), [str(path)])


def test_a_file_that_cannot_be_opened_or_read_names_itself(tmp_path):
    with pytest.raises(ConversionError, match=r"gone: cannot be opened: No such file"):
        read(stored(0, 0, "uint8", (1,)), [str(tmp_path / "gone")])
    with pytest.raises(ConversionError, match=r"cannot be read: Is a directory"):
        read(stored(0, 0, "uint8", (1,)), [str(tmp_path)])


def test_a_gather_forgets_what_failed(numbers):
    data, path = numbers
    files = Files([path])
    gather = Gather(files)
    gather.add_range(stored(0, SIZE, "uint8", (4,)), 0, 4, np.empty(4, np.uint8))
    with pytest.raises(ConversionError):
        gather.run()
    buffer = np.empty(4, np.uint8)
    gather.add_range(stored(0, 0, "uint8", (4,)), 0, 4, buffer)
    gather.run()
    files.close()
    assert np.array_equal(buffer, data[:4])


def test_few_files_stay_open_and_none_is_closed_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_MAX_OPEN", 3)
    paths = [str(tmp_path / str(n)) for n in range(40)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(bytes([number]) * 100)
    before = open_files()
    files = Files(paths)
    problems: list[object] = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 300):
            buffer = bytearray(100)
            files.read_into(int(number), 0, memoryview(buffer))
            if buffer != bytes([number]) * 100:
                problems.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert open_files() <= before + 6
    files.close()
    assert open_files() == before
