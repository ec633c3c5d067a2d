"""Several conversations in one row of a batch."""

from collections.abc import Sequence

import torch

from unimoe_model.data.encoded_media import Row
from unimoe_model.tokenization import IGNORED, TokenizedText


def packed(rows: Sequence[Row], most: int, least: int = 1) -> list[Row]:
    """Puts rows together, first-fit: each goes into the first row that has room for it.

    Args:
        rows: of one conversation each, in the order drawn.
        most: most tokens of a row; those of one conversation have no more.
        least: rows that there are at the least: the first so many begin one each.
    """
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        length = len(row.text.ids)
        fitting = (at for at, left in enumerate(room) if left >= length)
        place = next(fitting, None) if len(bins) >= least else None
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(most)
        bins[place].append(row)
        room[place] -= length
    return [_joined(held) for held in bins]


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
