"""Counters of the bytes that the all-to-all operator transfers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Traffic:
    """Totals of one rank's transfers.

    Attributes:
        sent: bytes of rows sent to other ranks.
        received: bytes of rows received from other ranks.
        kept: bytes of rows whose target was this rank.
        transfers: number of transfers, including those of backwards.
        counts: bytes of counts and headers sent to all other ranks.
        largest_buffer: size of the largest receive buffer, in bytes.
    """

    sent: int = 0
    received: int = 0
    kept: int = 0
    transfers: int = 0
    counts: int = 0
    largest_buffer: int = 0

    def add_transfer(
        self, row_bytes: int, input_splits: list[int], output_splits: list[int], own: int
    ) -> None:
        """Adds one transfer of rows."""
        self.sent += row_bytes * (sum(input_splits) - input_splits[own])
        self.received += row_bytes * (sum(output_splits) - output_splits[own])
        self.kept += row_bytes * input_splits[own]
        self.transfers += 1
        self.largest_buffer = max(self.largest_buffer, row_bytes * sum(output_splits))


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the transfers of this process inside the block; blocks may be nested.

    Example:
        >>> with count_traffic() as traffic:
        ...     y = MoE(16, 32, num_experts=4, top_k=2)(torch.ones(3, 16))
        >>> traffic.sent  # this layer is not sharded between ranks
        0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def note_transfer(rows: torch.Tensor, input_splits, output_splits, own: int) -> None:
    """Adds a transfer of rows `[R, ...]` to every active block."""
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    for traffic in _counting:
        traffic.add_transfer(row_bytes, input_splits, output_splits, own)


def note_counts(num_bytes: int) -> None:
    """Adds an exchange of counts to every active block."""
    for traffic in _counting:
        traffic.counts += num_bytes
