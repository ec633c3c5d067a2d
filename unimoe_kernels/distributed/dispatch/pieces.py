"""A tensor that is sent or arrives in pieces, without copies to cut it or to put it together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe_kernels import _checks


class Pieces:
    """Rows one piece after the other, and zeros where no piece is.

    Pieces that are received in `room` need not be put together: they lie in one tensor already.

    Args:
        sizes: rows of each piece.
        rest: rows after the last piece.
    """

    def __init__(self, sizes: Sequence[int], rest: int = 0) -> None:
        self.sizes = list(sizes)
        self.rest = rest
        self._whole: Tensor | None = None

    def room(self, piece: int, like: Tensor) -> Tensor:
        """Where a piece is to be put: `[sizes[piece], ...]`, dtype, device and width of `like`."""
        if self._whole is None:
            rows = sum(self.sizes)
            self._whole = like.new_empty((rows + self.rest, *like.shape[1:]))
            self._whole[rows:] = 0
        return self._whole.narrow(0, sum(self.sizes[:piece]), self.sizes[piece])

    def cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Returns the pieces of rows; gradients that were received in `room` are not copied."""
        return _Cut.apply(rows, self)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Puts pieces together; those that were received in `room` are not copied."""
        return _Join.apply(self, *pieces)

    def _put_together(self, pieces: Sequence[Tensor]) -> Tensor:
        for place, piece in enumerate(pieces):
            room = self.room(place, piece)
            if piece.data_ptr() != room.data_ptr():
                room.copy_(piece)
        whole, self._whole = self._whole, None
        return whole

    def _views(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([*self.sizes, self.rest])[: len(self.sizes)]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, pieces: Pieces) -> tuple[Tensor, ...]:
        ctx.pieces = pieces
        return pieces._views(rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        _checks.refuse_second_derivatives("dispatch of experts")
        return ctx.pieces._put_together(grads), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pieces: Pieces, *parts: Tensor) -> Tensor:
        ctx.pieces = pieces
        return pieces._put_together(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, *tuple[Tensor, ...]]:
        _checks.refuse_second_derivatives("dispatch of experts")
        return None, *ctx.pieces._views(grad)
