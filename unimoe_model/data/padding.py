"""Padding of token ids and labels to a batch."""

from collections.abc import Sequence

import torch

from unimoe_model.tokenization import IGNORED, TokenizedText


def padded(
    rows: Sequence[TokenizedText], pad_token_id: int, side: str, min_length: int = 1
) -> dict[str, torch.Tensor]:
    """Pads rows to the longest.

    Args:
        rows: B rows.
        pad_token_id: id at padding.
        side: side of the padding, `"right"` or `"left"`.
        min_length: minimum length S, padding included.

    Returns:
        `input_ids` and `labels` `[B, S]` int64, the latter -100 on padding, and `attention_mask`
        `[B, S]` int64, 0 on padding.
    """
    width = max(min_length, *(len(row.ids) for row in rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for number, row in enumerate(rows):
        length = len(row.ids)
        place = slice(width - length, None) if side == "left" else slice(length)
        ids[number, place] = torch.tensor(row.ids)
        mask[number, place] = 1
        labels[number, place] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
