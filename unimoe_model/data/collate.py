"""Turns examples into tensors: placeholders expanded, answers labelled, rows padded."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.examples import Example, MediaBank
from unimoe_model.prompt import build_prompt

IGNORED = -100


class Collator:
    """Makes model inputs of examples.

    Args:
        tokenizer: tokenizer with the media placeholders.
        config: says how many soft tokens an item of each kind becomes.
        bank: features of the media that examples refer to.
        query_states: kinds whose sets in the bank are a connector's query states rather than
            encoder features.
    """

    def __init__(
        self, tokenizer, config: UniMoEConfig, bank: MediaBank, query_states: Sequence[str] = ()
    ):
        self.bank = bank
        self._tokenizer = tokenizer
        self._suffix = {
            kind: "query_states" if kind in query_states else "features"
            for kind in config.media_token_ids
        }
        self._repeats = {
            token_id: config.num_soft_tokens(kind)
            for kind, token_id in config.media_token_ids.items()
        }
        self._prompt_ids = lru_cache(maxsize=None)(self._tokenize_prompt)
        self._answer_ids = lru_cache(maxsize=None)(self._tokenize_answer)

    def _tokenize_prompt(self, question: str, kinds: tuple[str, ...]) -> tuple[int, ...]:
        ids = self._tokenizer.encode(build_prompt(question, kinds), add_special_tokens=False)
        expanded = [self._tokenizer.bos_token_id]
        for token in ids:
            expanded += [token] * self._repeats.get(token, 1)
        return tuple(expanded)

    def _tokenize_answer(self, answer: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(f" {answer}", add_special_tokens=False)
        return (*ids, self._tokenizer.eos_token_id)

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Inputs for generation, padded on the left: `[B, S]` ids and mask, and the features."""
        rows = [self._prompt(example) for example in examples]
        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, **self._media(examples)}

    def training(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Inputs and labels, padded on the right; only answer and end token are labelled."""
        rows = [(self._prompt(e), self._answer_ids(e.answer)) for e in examples]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), self._tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            mask[i, :end] = 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            **self._media(examples),
        }

    def _prompt(self, example: Example) -> tuple[int, ...]:
        return self._prompt_ids(example.question, tuple(ref.kind for ref in example.media))

    def _media(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        gathered = self.bank.gather([ref for e in examples for ref in e.media])
        return {f"{kind}_{self._suffix[kind]}": tensor for kind, tensor in gathered.items()}
