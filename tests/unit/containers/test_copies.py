"""Files of ranks that are the same file, and files that only look alike."""

from __future__ import annotations

import pytest

from ckptx.containers import torch_zip
from ckptx.containers.copies import refuse_copies, rows_differ
from ckptx.errors import FormatError

torch = pytest.importorskip("torch")


def saved(place, *tensors):
    """Save one file for each rank, called alike: torch puts the name of a file into it."""
    paths = []
    for number, tensor in enumerate(tensors):
        paths.append(place / f"rank_{number}" / "model.pt")
        paths[-1].parent.mkdir()
        torch.save({"weight": tensor, "step": torch.tensor(7)}, paths[-1])
    return paths


@pytest.fixture(params=[True, False], ids=["checksums", "no-checksums"])
def checksums(request):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(request.param)
    yield
    torch.serialization.set_crc32_options(before)


@pytest.mark.usefixtures("checksums")
def test_copies_are_refused(tmp_path):
    one, other = torch.arange(4096.0), torch.arange(4096.0) + 1
    paths = saved(tmp_path, one, other, one)
    with pytest.raises(FormatError, match=r"rank_2/model.pt: is a copy of .*rank_0/model.pt"):
        refuse_copies(paths)


@pytest.mark.usefixtures("checksums")
def test_what_differs_anywhere_that_is_looked_at_is_no_copy(tmp_path):
    one = torch.arange(4096.0)
    last = one.clone()
    last[-1] = 0
    refuse_copies(saved(tmp_path, one, last, -one))


@pytest.mark.usefixtures("checksums")
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_alone_may_be_alike(value, dtype, tmp_path):
    padding = torch.full((4096,), value, dtype=dtype)
    refuse_copies(saved(tmp_path, padding, padding))


@pytest.mark.parametrize(
    ("rows", "differ"),
    [
        (torch.arange(32.0).sin().reshape(4, 8), True),
        (torch.arange(8.0).sin().repeat(4, 1), False),  # padding: the last row again
        (torch.arange(24.0).sin().reshape(3, 8), False),  # one row of query, key and value each
        (torch.arange(8.0).sin().reshape(4, 2), False),  # so few bytes may come again by chance
        (torch.arange(32.0).sin(), False),
    ],
)
def test_rows_that_differ_tell_a_share(rows, differ, tmp_path):
    (path,) = saved(tmp_path, rows)
    weight = torch_zip.read(path, 0)["weight"]
    assert rows_differ([path], [weight]) is differ
