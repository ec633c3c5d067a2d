"""Pieces of a tensor: cut and joined like split and cat, without a copy where they lie already."""

import pytest
import torch

from unimoe_kernels.distributed.dispatch.pieces import Pieces

SIZES = [([3], 0), ([2, 0, 3], 0), ([1, 4], 2), ([0, 0], 3), ([0], 0)]


@pytest.mark.parametrize(("sizes", "rest"), SIZES)
def test_cut_and_its_gradient(sizes, rest):
    rows = torch.randn(sum(sizes) + rest, 2, dtype=torch.float64, requires_grad=True)
    pieces = Pieces(sizes, rest).cut(rows)
    assert [len(piece) for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces), rows[: sum(sizes)])
    assert torch.autograd.gradcheck(
        lambda rows: tuple(piece.square() for piece in Pieces(sizes, rest).cut(rows)), rows
    )


@pytest.mark.parametrize(("sizes", "rest"), SIZES)
def test_join_and_its_gradient(sizes, rest):
    parts = [torch.randn(size, 2, dtype=torch.float64, requires_grad=True) for size in sizes]
    whole = Pieces(sizes, rest).join(parts)
    assert torch.equal(whole, torch.cat([*parts, whole.new_zeros(rest, 2)]))
    assert torch.autograd.gradcheck(lambda *parts: Pieces(sizes, rest).join(parts).square(), parts)


def test_what_was_put_in_its_room_is_not_copied():
    pieces, like = Pieces([2, 1], 1), torch.zeros(5, 3)
    rooms = [pieces.room(place, like) for place in range(2)]
    for place, room in enumerate(rooms):
        room.fill_(1 + place)
    whole = pieces.join(rooms)
    assert whole.data_ptr() == rooms[0].data_ptr()
    assert whole[:, 0].tolist() == [1, 1, 2, 0]
    assert pieces.room(0, like).data_ptr() != whole.data_ptr(), "the next call has room of its own"
