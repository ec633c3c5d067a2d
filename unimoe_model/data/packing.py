"""Packing of several conversations into one row of a batch."""

import math
from collections.abc import Sequence

import torch

from unimoe_model.data.encoded_media import Row
from unimoe_model.tokenization import IGNORED, TokenizedText


def packed(rows: Sequence[Row], most: int, least: int = 1) -> list[Row]:
    """Packs rows first-fit: each is appended to the first row with room for it.

    The row length is then reduced as far as the number of rows allows, because half-empty rows
    would be padded to the longest.

    Args:
        rows: rows of one conversation each, in the order drawn.
        most: maximum tokens per row; no conversation may be longer.
        least: minimum number of rows: the first `least` conversations each start a row.

    Returns:
        The packed rows, with `lengths` set.
    """
    lengths = [len(row.text.ids) for row in rows]
    best = _first_fit(lengths, most, least)
    shortest = max(*lengths, math.ceil(sum(lengths) / len(best)))
    while shortest < most:
        middle = (shortest + most) // 2
        places = _first_fit(lengths, middle, least)
        if len(places) == len(best):
            best, most = places, middle
        else:
            shortest = middle + 1
    return [_joined([rows[at] for at in held]) for held in best]


def _first_fit(lengths: Sequence[int], most: int, least: int) -> list[list[int]]:
    """Indices of the conversations in each row."""
    held: list[list[int]] = []
    room: list[int] = []
    for number, length in enumerate(lengths):
        fitting = (at for at, left in enumerate(room) if left >= length)
        place = next(fitting, None) if len(held) >= least else None
        if place is None:
            place = len(held)
            held.append([])
            room.append(most)
        held[place].append(number)
        room[place] -= length
    return held


def restarting_positions(lengths: Sequence[Sequence[int]], width: int, side: str) -> torch.Tensor:
    """Position ids that restart at 0 for each conversation and for the padding.

    Without a 2-D attention mask, transformers restricts attention to each such sequence
    (`masking_utils.find_packed_sequence_indices`).

    Args:
        lengths: number of tokens of each conversation, row by row.
        width: tokens per row, padding included.
        side: side of the padding, `"left"` or `"right"`.

    Returns:
        `[B, width]` int64.
    """
    rows = []
    for row in lengths:
        padding = width - sum(row)
        blocks = [padding, *row] if side == "left" else [*row, padding]
        rows.append(torch.cat([torch.arange(block) for block in blocks]))
    return torch.stack(rows)


def _joined(rows: Sequence[Row]) -> Row:
    # A conversation's first token has no label: it must not be predicted from the previous one.
    labels = [label for row in rows for label in (IGNORED, *row.text.labels[1:])]
    ids = [token for row in rows for token in row.text.ids]
    media = tuple(item for row in rows for item in row.media)
    return Row(TokenizedText(ids, labels), media, tuple(len(row.text.ids) for row in rows))
