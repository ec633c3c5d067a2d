"""Ranking of names for a picture by the likelihood that a model assigns to them."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe_model.data.encoded_media import Row
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.tokenization import TokenizedText

ROWS_AT_ONCE = 32


class NameTree:
    """A prefix tree of names as token sequences, each with an end-of-turn token."""

    def __init__(self, processor: UniMoEProcessor, names: Sequence[str]):
        """Tokenises names.

        Args:
            processor: processor of the model.
            names: distinct names.
        """
        end = processor.stop_token_ids[-1]
        self.next: dict[tuple[int, ...], list[int]] = {}
        self.names: dict[tuple[int, ...], str] = {}
        for name in names:
            ids = (*processor.tokenizer(name, add_special_tokens=False)["input_ids"], end)
            self.names[ids] = name
            for length in range(len(ids)):
                followers = self.next.setdefault(ids[:length], [])
                if ids[length] not in followers:
                    followers.append(ids[length])


@torch.inference_mode()
def likeliest_names(
    model: UniMoEForConditionalGeneration,
    processor: UniMoEProcessor,
    rows: Sequence[Row],
    names: Sequence[str],
    top: int = 5,
) -> list[list[str]]:
    """Returns the likeliest names of each row, likeliest first.

    A name's likelihood is that of its tokens and of the end token after them. A prefix is at least
    as likely as its continuations, so only prefixes that can still lead to one of the top names are
    evaluated; the result is the same as that of an exhaustive search.

    Args:
        model: the model in evaluation mode.
        processor: processor of the model.
        rows: questions with their media.
        names: distinct names to compare.
        top: number of names to return.

    Raises:
        ValueError: If there are fewer names than `top`.
    """
    if len(names) < top:
        raise ValueError(f"names ({len(names)}) must be at least top ({top})")
    tree = NameTree(processor, names)
    found: list[list[str]] = [[] for _ in rows]
    # For each row, a heap of the prefixes to be evaluated, likeliest first.
    open_: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in rows]
    while True:
        asked = []
        for number, own in enumerate(open_):
            while own and len(found[number]) < top:
                if own[0][1] not in tree.names:
                    asked.append((number, *heapq.heappop(own)))
                    break
                found[number].append(tree.names[heapq.heappop(own)[1]])
        if not asked:
            return found
        for start in range(0, len(asked), ROWS_AT_ONCE):
            group = asked[start : start + ROWS_AT_ONCE]
            logs = _next_logs(model, processor, [(rows[n], begun) for n, _, begun in group])
            for (number, cost, begun), log in zip(group, logs, strict=True):
                for token in tree.next[begun]:
                    entry = (cost - log[token].item(), (*begun, token))
                    heapq.heappush(open_[number], entry)


def _next_logs(
    model: UniMoEForConditionalGeneration,
    processor: UniMoEProcessor,
    begun: Sequence[tuple[Row, tuple[int, ...]]],
) -> Tensor:
    """Returns log-probabilities `[rows, V]` of the token after each prompt and name prefix."""
    rows = [Row(_followed(row.text, ids), row.media) for row, ids in begun]
    batch = processor.collate(rows, "left")
    del batch["labels"]
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
    return logits.float().log_softmax(-1).cpu()


def _followed(text: TokenizedText, ids: tuple[int, ...]) -> TokenizedText:
    return TokenizedText([*text.ids, *ids], [*text.labels, *ids])
