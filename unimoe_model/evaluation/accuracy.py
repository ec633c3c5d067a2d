"""Accuracy of greedy, unconstrained generation, letter for letter, and the blind baseline."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import torch

from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example


@torch.inference_mode()
def generate_answers(
    model,
    tokenizer,
    collator: Collator,
    examples: Sequence[Example],
    batch_size: int = 128,
    max_new_tokens: int = 12,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers of the model, any tokens allowed.

    Args:
        model: Uni-MoE model in eval mode.
        tokenizer: its tokenizer.
        collator: makes its inputs.
        examples: what is asked.
        batch_size: examples generated for at once; sorted by length to save padding.
        max_new_tokens: longest answer.
        on_batch: is told the examples done since the last call.

    Returns:
        Answers in the order of `examples`, stripped of white space.
    """
    order = sorted(range(len(examples)), key=lambda i: _length(examples[i]))
    answers = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = collator.prompts([examples[i] for i in chosen])
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        produced = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = produced[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        on_batch(len(chosen))
    return answers


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of answers that are the expected ones, letter for letter.

    Raises:
        ValueError: If there are no examples, or not as many answers.
    """
    if not examples or len(answers) != len(examples):
        raise ValueError(
            f"answers ({len(answers)}) must be as many as examples ({len(examples)}), at least 1"
        )
    pairs = zip(answers, examples, strict=True)
    return sum(answer == example.answer for answer, example in pairs) / len(examples)


def blind_answers(train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The most frequent training answer of each example's `blind_key`.

    This is the best that can be done without the input the task is about. Ties go to the answer
    that comes first in the alphabet; a key without training examples gets the overall answer.
    """
    by_key = defaultdict(Counter)
    overall = Counter()
    for example in train:
        by_key[example.blind_key][example.answer] += 1
        overall[example.answer] += 1
    return [_most_frequent(by_key.get(e.blind_key) or overall) for e in examples]


def _most_frequent(counts: Counter) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _length(example: Example) -> tuple[int, int]:
    return (len(example.media), len(example.question))
