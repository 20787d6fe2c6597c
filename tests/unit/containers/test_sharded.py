"""Where a rank's share lies in the whole, against torch's own computation."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptx.containers.pickle_values import TorchDtype, stub
from ckptx.containers.sharded import Placement, Rank, local_box, share
from ckptx.errors import FormatError
from ckptx.tensors import tiling
from ckptx.tensors.lazy import stored

pytest.importorskip("torch")

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


@st.composite
def shardings(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    axes = st.one_of(st.none(), st.integers(0, len(shape) - 1))
    return shape, mesh, [draw(axes) for _ in mesh]


@given(shardings())
def test_plain_shards_lie_where_torch_says(sharding):
    shape, mesh, axes = sharding
    ours = [Placement(axis) for axis in axes]
    theirs = [Replicate() if axis is None else Shard(axis) for axis in axes]
    boxes = {}
    for coordinates in itertools.product(*map(range, mesh)):
        offsets, sizes = local_box(shape, mesh, coordinates, ours)
        found = _compute_local_shape_and_global_offset(shape, mesh, list(coordinates), theirs)
        assert sizes == found[0]
        if 0 not in sizes:
            assert offsets == found[1]
        boxes[offsets, sizes] = None
    assert tiling.fault(shape, list(boxes)) == ""


@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_strided_shards_lie_where_torch_says(rows, mesh):
    """Torch's computation means FSDP's shards where every axis of the mesh divides the rows."""
    shape = (rows * math.prod(mesh), 2)
    later = [math.prod(mesh[axis + 1 :]) for axis in range(len(mesh))]
    ours = [Placement(0, factor) for factor in later]
    theirs = [_StridedShard(0, split_factor=factor) for factor in later[:-1]]
    for coordinates in itertools.product(*map(range, mesh)):
        offsets, sizes = local_box(shape, tuple(mesh), coordinates, ours)
        found = _compute_local_shape_and_global_offset(
            shape, tuple(mesh), list(coordinates), [*theirs, Shard(0)]
        )
        assert (sizes, offsets) == found


TENSOR = "torch.distributed.tensor"


def record(module, name, **state):
    made = stub(module, name)()
    made.__setstate__(state)
    return made


def dtensor(local, shape, placement, **mesh):
    """A DTensor as its pickle is read, of rank 0 of 2."""
    layout = record("torch", "_FlatLayout", shape=(2,), stride=(1,))
    layouts = record("torch", "_MeshLayout", axes=(layout,))
    said = {"_layout": layouts, "_root_mesh": None, "_coordinate_on_dim": (0,)}
    spec = record(
        TENSOR,
        "DTensorSpec",
        mesh=record(TENSOR, "DeviceMesh", **said | mesh),
        placements=(placement,),
    )
    kind = stub(TENSOR, "DTensor")
    state = (None, {"_local_tensor": local, "_spec": spec})
    args = kind, TorchDtype("float32"), shape, (1,), 0
    rebuilt = stub("torch._tensor", "_rebuild_from_type_v2")
    return rebuilt(stub("torch._utils", "_rebuild_wrapper_subclass"), kind, args, state)


LOCAL = stored(0, 0, "float32", (3,))
ROWS = record(TENSOR, "Shard", dim=0)


def test_a_share_has_its_place():
    found = share(dtensor(LOCAL, (5,), ROWS), Rank("f", 0, 2), "w")
    assert (found.shape, found.boxes) == ((5,), (((0,), LOCAL),))


def test_a_layout_of_older_torch():
    layout = record("torch", "_MeshLayout", shape=((2, 1),), stride=((1, 1),))
    found = share(dtensor(LOCAL, (5,), ROWS, _layout=layout), Rank("f", 0, 2), "w")
    assert found.boxes == (((0,), LOCAL),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dtensor(LOCAL, (7,), ROWS), r"expected a local tensor \[4\] at coordinates \[0\]"),
        (dtensor(LOCAL, (5,), ROWS, _coordinate_on_dim=(2,)), "coordinates .2. in a mesh of .2."),
        (dtensor(LOCAL, (5,), ROWS, _coordinate_on_dim=None), "expected a tensor, a DTensor"),
        (dtensor(LOCAL, (5,), ROWS, _coordinate_on_dim=(0, 0)), "1 placements on a mesh"),
        (dtensor(LOCAL, (5,), ROWS, _rank=1), "was saved by rank 1"),
        (dtensor(LOCAL, (5,), ROWS, _layout=record("torch", "_MeshLayout", shape=(4,))), "4 ranks"),
        (dtensor(LOCAL, (5,), record(TENSOR, "Shard", dim=1)), "expected a tensor, a DTensor"),
        (dtensor(LOCAL, (5,), record(TENSOR, "Shard", dim=-1)), "expected a tensor, a DTensor"),
        (dtensor(LOCAL, (5,), record(TENSOR, "_MaskPartial")), "found placement _MaskPartial"),
        (
            dtensor(LOCAL, (5,), record(TENSOR, "_StridedShard", dim=0, split_factor=2)),
            "found _StridedShard with split factor 2, expected 1",
        ),
        (dtensor(LOCAL, (5, 1), ROWS), "expected a local tensor"),
        (dtensor(None, (5,), ROWS), "a local tensor that is NoneType"),
        (dtensor(stored(0, 0, "float16", (3,)), (5,), ROWS), "found float16"),
    ],
)
def test_what_does_not_fit_is_refused(value, message):
    with pytest.raises(FormatError, match=message):
        share(value, Rank("f", 0, 2), "w")
