"""Several conversations in one row of a batch."""

import math
from collections.abc import Sequence

import torch

from unimoe_model.data.encoded_media import Row
from unimoe_model.tokenization import IGNORED, TokenizedText


def packed(rows: Sequence[Row], most: int, least: int = 1) -> list[Row]:
    """Puts rows together, first-fit: each goes into the first row that has room for it.

    Where shorter rows do for as many of them, they are made so short: a row that is left half empty
    would be padded to the longest.

    Args:
        rows: of one conversation each, in the order drawn.
        most: most tokens of a row; those of one conversation have no more.
        least: rows that there are at the least: the first so many begin one each.
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
    """Numbers of the conversations of each row."""
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
    """Position ids that begin at 0 for each conversation, and for the padding.

    Without a 2-D attention mask, transformers keeps attention within each such sequence
    (`masking_utils.find_packed_sequence_indices`).

    Args:
        lengths: tokens of each conversation, row by row.
        width: tokens of a row, padding included.
        side: `"left"` or `"right"`, where the padding is.

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
    # What comes before a conversation's first token is another conversation, or nothing.
    labels = [label for row in rows for label in (IGNORED, *row.text.labels[1:])]
    ids = [token for row in rows for token in row.text.ids]
    media = tuple(item for row in rows for item in row.media)
    return Row(TokenizedText(ids, labels), media, tuple(len(row.text.ids) for row in rows))
