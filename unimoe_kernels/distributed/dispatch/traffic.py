"""Counts the bytes that the all-to-all operator moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Traffic:
    """What one rank's transfers amount to.

    Attributes:
        sent: bytes of rows that went to other ranks.
        received: bytes of rows that came from other ranks.
        kept: bytes of rows whose target was this rank.
        transfers: number of transfers, backwards included.
        counts: bytes of counts and headers that went to each other rank, times those ranks.
        largest_buffer: bytes of the largest receive buffer.
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
    """Counts what this process transfers inside the block; blocks may be nested.

    Example:
        >>> with count_traffic() as traffic:
        ...     y = MoE(16, 32, num_experts=4, top_k=2)(torch.ones(3, 16))
        >>> traffic.sent  # this layer is not split between ranks
        0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def note_transfer(rows: torch.Tensor, input_splits, output_splits, own: int) -> None:
    """Tells every open block of a transfer of rows `[R, ...]`."""
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    for traffic in _counting:
        traffic.add_transfer(row_bytes, input_splits, output_splits, own)


def note_counts(num_bytes: int) -> None:
    """Tells every open block of an exchange of counts."""
    for traffic in _counting:
        traffic.counts += num_bytes
