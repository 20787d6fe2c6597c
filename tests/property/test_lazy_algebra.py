"""Random chains of the algebra, read from files, against eager torch doing the same.

Files hold random bits at odd offsets between junk; every tensor is a pair: lazy, and what torch
makes of the same bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptx.storage.gather import Gather, read
from ckptx.storage.open_files import Files
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.joins import concat, deinterleave, interleave, stack, tile
from ckptx.tensors.lazy import (
    Cast,
    Computed,
    Filled,
    LazyTensor,
    Sliced,
    Stored,
    replicated,
    stored,
)
from ckptx.tensors.operations import dequantised
from ckptx.tensors.pieces import flat_boxes, leaves, pieces

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Pair = tuple[LazyTensor, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor, NaNs apart: their bits differ from one processor to another."""
    raw = tensor.contiguous().view(UNSIGNED[tensor.element_size()]).clone()
    if tensor.dtype.is_floating_point:
        raw[torch.isnan(tensor.to(torch.float64))] = -1 if tensor.element_size() > 1 else 255
    return raw


def as_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    if not array.size:
        return torch.empty(array.shape, dtype=getattr(torch, dtype))
    raw = torch.from_numpy(np.array(bytearray(array.tobytes()), np.uint8))
    typed = raw.view(getattr(torch, dtype))
    return typed if array.dtype == np.uint8 else typed.reshape(array.shape)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.dtype == torch.complex64:
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    assert torch.equal(bits(found), bits(expected))


@dataclass
class Disk:
    """Memory files (``memfd``) that tensors are put into at any offset, and the pairs in them."""

    rng: np.random.Generator
    blobs: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray()])

    def put(self, dtype: str, shape: tuple[int, ...], gap: int = 0) -> Pair:
        count = math.prod(shape)
        raw = self.rng.integers(0, 256, count * ITEMSIZE[dtype], dtype=np.uint8)
        if dtype == "bool":
            raw &= 1
        number = int(self.rng.integers(0, len(self.blobs)))
        blob = self.blobs[number]
        blob += self.rng.bytes(gap)
        offset = len(blob)
        blob += raw.tobytes()
        return stored(number, offset, dtype, shape), as_torch(raw, dtype).reshape(shape)

    def files(self) -> list[str]:
        self.descriptors = [os.memfd_create("ckptx-test") for _ in self.blobs]
        for descriptor, blob in zip(self.descriptors, self.blobs, strict=True):
            os.pwrite(descriptor, blob, 0)
        return [f"/proc/self/fd/{descriptor}" for descriptor in self.descriptors]

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    """Return bounds that cut a length unevenly: ``[0, ..., size]``."""
    return st.sets(st.integers(0, size), max_size=3).map(lambda s: sorted(s | {0, size}))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def grown(draw: st.DrawFn, disk: Disk, pair: Pair) -> Pair:
    """Return a tensor after one random step."""
    lazy, eager = pair
    axes = list(range(eager.dim()))
    axis = draw(st.sampled_from(axes))
    size = eager.shape[axis]
    steps = ["permute", "split", "concat", "tile", "stack", "replicated", "flat", "interleave"]
    steps += ["narrow"] * 2 + ["cast"] * (str(eager.dtype)[6:] in (*FLOATS, *FLOAT8))
    steps += ["merge", "merge"] * (axis + 1 < eager.dim()) + ["deinterleave"]
    match draw(st.sampled_from(steps)):
        case "narrow":
            start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
            return lazy.narrow(axis, start, stop), eager.narrow(axis, start, stop - start)
        case "permute":
            order = draw(st.permutations(axes))
            return lazy.permute(order), eager.permute(order)
        case "split" if size:
            inner = draw(st.sampled_from(divisors(size)))
            return lazy.split(axis, inner), eager.unflatten(axis, (size // inner, inner))
        case "merge":
            return lazy.merge(axis), eager.flatten(axis, axis + 1)
        case "concat":
            other_size = draw(st.integers(0, 3))
            shape = (*eager.shape[:axis], other_size, *eager.shape[axis + 1 :])
            other = disk.put(str(eager.dtype)[6:], shape, draw(st.integers(0, 9)))
            parts = draw(st.permutations([pair, other, pair]))
            return concat([p[0] for p in parts], axis), torch.cat([p[1] for p in parts], axis)
        case "tile":
            bounds = [draw(cuts(n)) for n in eager.shape]
            tiles = []
            for corner in itertools.product(*(itertools.pairwise(b) for b in bounds)):
                part = lazy
                for a, (low, high) in enumerate(corner):
                    part = part.narrow(a, low, high)
                tiles.append((tuple(low for low, _ in corner), part))
            return (tile(eager.shape, tiles) if tiles else lazy), eager
        case "stack":
            return stack([lazy, lazy]), torch.stack([eager, eager])
        case "replicated":
            return replicated([lazy, lazy.narrow(axis, 0, size)]), eager
        case "flat" if eager.numel():
            # ZeRO: the flat tensor lies in pieces that end anywhere, and is cut to rows again.
            flat, flat_eager = lazy, eager
            while len(flat.shape) > 1:
                flat, flat_eager = flat.merge(0), flat_eager.flatten(0, 1)
            parts = [flat.narrow(0, a, b) for a, b in itertools.pairwise(draw(cuts(eager.numel())))]
            inner = draw(st.sampled_from(divisors(eager.numel())))
            return concat(parts).split(0, inner), flat_eager.unflatten(0, (-1, inner))
        case "cast":
            target = draw(st.sampled_from(FLOATS))
            return lazy.cast(target), eager.to(getattr(torch, target))
        case "interleave" if size:
            groups = draw(st.sampled_from(divisors(size)))
            chunks = eager.chunk(groups, axis)
            fused = torch.cat([c for chunk in chunks for c in (chunk, chunk)], axis)
            return interleave([lazy, lazy], groups, axis), fused
        case "deinterleave" if size:
            groups = draw(st.sampled_from(divisors(size)))
            first = draw(st.integers(0, size // groups))
            sizes = [first * groups, size - first * groups]
            chosen = draw(st.integers(0, 1))
            rows = eager.movedim(axis, 0).unflatten(0, (groups, size // groups))
            taken = rows[:, :first] if chosen == 0 else rows[:, first:]
            part = taken.flatten(0, 1).movedim(0, axis)
            return deinterleave(lazy, sizes, groups, axis)[chosen], part
    return pair


def scaled(draw: st.DrawFn, disk: Disk, pair: Pair) -> Pair:
    """Return a float8 matrix times the scales of its blocks."""
    lazy, eager = pair
    rows, columns = block = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    grid = tuple(-(-size // part) for size, part in zip(eager.shape, block, strict=True))
    scale, scale_eager = disk.put("float32", grid)
    wide = scale_eager.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    product = eager.float() * wide[: eager.shape[0], : eager.shape[1]]
    dtype = draw(st.sampled_from(("float32", "bfloat16")))
    return dequantised(lazy, scale, block, dtype), product.to(getattr(torch, dtype))


@st.composite
def chains(draw: st.DrawFn) -> tuple[Disk, LazyTensor, torch.Tensor]:
    disk = Disk(np.random.default_rng(draw(st.integers(0, 2**32))))
    dtype = draw(st.sampled_from(sorted(set(ITEMSIZE) - {"uint64", "uint32", "uint16"})))
    shape = tuple(draw(st.lists(st.integers(0, 6) | st.integers(2, 6), min_size=1, max_size=3)))
    pair = disk.put(dtype, shape, draw(st.integers(0, 9)))
    if dtype in FLOAT8 and len(shape) == 2:
        pair = scaled(draw, disk, pair)
    for _ in range(draw(st.integers(0, 8))):
        if pair[1].numel() > 3000 or pair[1].dim() > 5:
            break
        pair = grown(draw, disk, pair)
    return disk, *pair


def random_box(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    box = []
    for size in shape:
        start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        box.append((start, stop))
    return tuple(box)


@SETTINGS
@given(chains(), st.data())
def test_chains_read_as_torch_computes_them(chain, data):
    disk, lazy, eager = chain
    dtype = str(eager.dtype)[6:]
    assert (lazy.dtype, lazy.shape, lazy.nbytes) == (dtype, tuple(eager.shape), eager.nbytes)
    box = random_box(data.draw, lazy.shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, lazy.numel)] * 2)))
    paths = disk.files()
    files = Files(paths)
    try:
        assert_same(as_torch(read(lazy, paths), dtype).reshape(lazy.shape), eager)
        cut = eager[tuple(slice(*bounds) for bounds in box)]
        assert_same(as_torch(read(lazy, files, box), dtype).reshape(cut.shape), cut)
        gather = Gather(files)
        for _ in range(2):  # a gather is used again
            buffer = np.full((stop - start) * ITEMSIZE[dtype], 0xA5, np.uint8)
            gather.add_range(lazy, start, stop, buffer)
            gather.run()
            assert_same(as_torch(buffer, dtype), eager.reshape(-1)[start:stop])
    finally:
        files.close()
        disk.close()


@SETTINGS
@given(chains(), st.data())
def test_pieces_fill_every_element_of_a_box_once(chain, data):
    _, lazy, _ = chain
    box = random_box(data.draw, lazy.shape)
    lengths = [stop - start for start, stop in box]
    count = np.zeros(math.prod(lengths), np.uint8)
    for piece in pieces(lazy, box):
        computed = isinstance(piece.leaf, Sliced) and isinstance(piece.leaf.base, Computed)
        assert computed or isinstance(piece.leaf, Stored | Filled | Cast)
        for index in np.ndindex(*piece.leaf.shape):
            count[piece.offset + sum(map(int.__mul__, index, piece.strides))] += 1
    assert (count == 1).all()
    assert sum(math.prod(p.leaf.shape) for p in pieces(lazy, box)) == count.size


@SETTINGS
@given(chains())
def test_nodes_travel_between_processes(chain):
    lazy = chain[1]
    assert pickle.loads(pickle.dumps(lazy)) == lazy
    hash(lazy)


@SETTINGS
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_flat_boxes_number_the_elements_in_order(shape, data):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, numbers.size)] * 2)))
    found = np.full(stop - start, -1)
    for box, place in flat_boxes(shape, start, stop):
        block = numbers[tuple(slice(*bounds) for bounds in box)].reshape(-1)
        found[place : place + block.size] = block
    assert (found == np.arange(start, stop)).all()


@SETTINGS
@given(
    groups=st.integers(1, 4),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    hidden=st.integers(1, 4),
    tp=st.sampled_from([1, 2]),
    stride=st.integers(0, 2),
)
def test_fused_attention_splits_into_the_very_same_leaves(
    groups, heads, head_dim, hidden, tp, stride
):
    rows = [groups * tp * heads * head_dim, groups * tp * head_dim, groups * tp * head_dim]
    parts = [stored(0, 1000 * n, "bfloat16", (r, hidden + stride)) for n, r in enumerate(rows)]
    parts = [part.narrow(1, 0, hidden) for part in parts]
    fused = interleave(parts, groups * tp)
    ranks = [fused.chunk(0, tp, rank) for rank in range(tp)]
    split = [deinterleave(rank, [r // tp for r in rows], groups) for rank in ranks]
    for number, part in enumerate(parts):
        cut = [part.chunk(0, tp, rank) for rank in range(tp)]
        assert [shard[number] for shard in split] == cut
    whole = deinterleave(fused, rows, groups * tp)
    assert whole == parts
    assert deinterleave(concat(whole), rows, 1) == parts


@SETTINGS
@given(half=st.integers(1, 4), tp=st.sampled_from([1, 2, 4]), hidden=st.integers(1, 4))
def test_a_gated_weight_splits_into_the_very_same_leaves(half, tp, hidden):
    gate, up = (stored(n, 0, "float32", (half * tp, hidden)) for n in range(2))
    shards = [concat([gate.chunk(0, tp, r), up.chunk(0, tp, r)]) for r in range(tp)]
    joined = concat(shards)
    found = deinterleave(joined, [half * tp, half * tp], tp)
    assert list(leaves(found[0])) == [gate.chunk(0, tp, r) for r in range(tp)]
    assert list(leaves(found[1])) == [up.chunk(0, tp, r) for r in range(tp)]
    assert deinterleave(interleave([gate, up], tp), [half * tp, half * tp], tp) == [gate, up]
    assert stack([gate, up]).narrow(0, 1, 2).squeeze() == up


def all_values(dtype: str) -> torch.Tensor:
    """Return every value of a narrow dtype; of a wide one all narrow values and their midpoints."""
    if ITEMSIZE[dtype] <= 2:
        every = np.arange(1 << 8 * ITEMSIZE[dtype], dtype=f"u{ITEMSIZE[dtype]}")
        return as_torch(every, dtype)
    narrow = torch.cat([all_values(d).double() for d in ("float16", "bfloat16", *FLOAT8)])
    ordered = narrow[narrow.isfinite()].unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    ends = torch.tensor([math.inf, -math.inf, math.nan, 1e-300, 1e300, -1e300, 5e-324], dtype=float)
    near = [middle.nextafter(ends[0]), middle.nextafter(ends[1])]
    singles = middle.float()
    near += [singles.nextafter(torch.tensor(v)).double() for v in (math.inf, -math.inf)]
    random = np.random.default_rng(5).integers(0, 256, 1 << 18, dtype=np.uint8)
    values = torch.cat([narrow, middle, *near, ends]).to(getattr(torch, dtype))
    return torch.cat([values, as_torch(random, dtype)])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", [*FLOATS, *FLOAT8])
def test_casts_round_as_torch_does(tmp_path, source, target):
    values = all_values(source)
    path = tmp_path / "values"
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    lazy = stored(0, 0, source, tuple(values.shape)).cast(target)
    assert_same(as_torch(read(lazy, [str(path)]), target), values.to(getattr(torch, target)))


@pytest.mark.parametrize("chain", list(itertools.permutations(FLOATS, 3)), ids="-".join)
def test_a_cast_of_a_cast_rounds_twice(tmp_path, chain):
    source, between, target = chain
    values = all_values(source)
    path = tmp_path / "values"
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    lazy = stored(0, 0, source, tuple(values.shape)).cast(between).cast(target)
    expected = values.to(getattr(torch, between)).to(getattr(torch, target))
    assert_same(as_torch(read(lazy, [str(path)]), target), expected)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_padding_of_every_dtype_is_zero(tmp_path, dtype):
    path = tmp_path / "data"
    path.write_bytes(b"\xff" * 4 * ITEMSIZE[dtype])
    lazy = concat([stored(0, 0, dtype, (4,)), Filled(dtype, (3,))])
    expected = b"\xff" * 4 * ITEMSIZE[dtype] + bytes(3 * ITEMSIZE[dtype])
    assert read(lazy, [str(path)]).tobytes() == expected


@SETTINGS
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.data())
def test_any_strides_read_as_torch_reads_them(strides, data):
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(strides), max_size=len(strides)))
    size = 1 + sum((n - 1) * s for n, s in zip(counts, strides, strict=True))
    storage = torch.from_numpy(np.random.default_rng(size).integers(0, 2**15, size, np.int16))
    disk = Disk(np.random.default_rng(0), [bytearray(b"odd" + storage.numpy().tobytes())])
    lazy = Stored("int16", tuple(counts), 0, 3, tuple(strides))
    order = data.draw(st.permutations(range(len(counts))))
    try:
        found = read(lazy.permute(order), disk.files())
        assert_same(as_torch(found, "int16"), storage.as_strided(counts, strides).permute(order))
    finally:
        disk.close()
