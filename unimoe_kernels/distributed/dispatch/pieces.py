"""A tensor that is sent or received in pieces, split and joined without copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe_kernels import _checks


class Pieces:
    """Consecutive pieces of rows, followed by rows of zeros.

    Pieces that are received in `room` are already parts of one tensor, so `join` does not copy
    them.

    Args:
        sizes: number of rows of each piece.
        rest: number of rows after the last piece.
    """

    def __init__(self, sizes: Sequence[int], rest: int = 0) -> None:
        self.sizes = list(sizes)
        self.rest = rest
        self._whole: Tensor | None = None

    def room(self, piece: int, like: Tensor) -> Tensor:
        """Returns the buffer of a piece: `[sizes[piece], ...]`, otherwise like `like`."""
        if self._whole is None:
            rows = sum(self.sizes)
            self._whole = like.new_empty((rows + self.rest, *like.shape[1:]))
            self._whole[rows:] = 0
        return self._whole.narrow(0, sum(self.sizes[:piece]), self.sizes[piece])

    def cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Returns the pieces of rows; gradients that were received in `room` are not copied."""
        return _Cut.apply(rows, self)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Joins pieces; those that were received in `room` are not copied."""
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
