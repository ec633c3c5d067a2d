"""From examples to tensors: media bank, collator, mixture."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from unimoe_model.data.collate import IGNORED, Collator
from unimoe_model.data.examples import Example, MediaBank, MediaRef
from unimoe_model.data.mixture import Mixture
from unimoe_model.prompt import build_prompt
from unimoe_model.tokenization import tokenize_text


@pytest.fixture
def bank(features):
    bank = MediaBank()
    bank.add("pictures", "image", features("image", 5).half())
    bank.add("clips", "speech", features("speech", 4).half())
    return bank


def image(index):
    return MediaRef("image", "pictures", index)


def clip(index):
    return MediaRef("speech", "clips", index)


EXAMPLES = [
    Example("a", "what shape is it?", "circle", (image(3),)),
    Example("b", "", "yes", (image(1), clip(2))),
    Example("c", "yes or no?", "no"),
    Example("d", "same?", "no", (image(4), image(0))),
]


def test_bank_stacks_items_in_order_as_float32(bank):
    gathered = bank.gather([image(3), clip(0), image(1)])
    assert set(gathered) == {"image", "speech"}
    assert gathered["image"].dtype == torch.float32
    assert torch.equal(gathered["image"], bank.sets["pictures"][[3, 1]].float())
    assert bank.gather([]) == {}


def test_bank_refuses_what_it_does_not_hold(bank, features):
    with pytest.raises(ValueError, match=r"source \(\['films'\]\) must be among"):
        bank.gather([MediaRef("image", "films", 0)])
    bank.add("others", "image", features("image")[:, :2])
    with pytest.raises(ValueError, match="image sets of one batch must share a shape"):
        bank.gather([image(0), MediaRef("image", "others", 0)])


@pytest.fixture
def collator(tokenizer, tiny_config, bank):
    return Collator(tokenizer, tiny_config(), bank)


def test_only_answer_and_end_are_labelled(collator, tokenizer):
    batch = collator.training(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        labels = batch["labels"][row]
        expected = [*tokenizer.encode(f" {example.answer}"), tokenizer.eos_token_id]
        wanted = labels != IGNORED
        assert labels[wanted].tolist() == expected
        assert batch["input_ids"][row][wanted].tolist() == expected
        real = batch["attention_mask"][row].bool()
        assert wanted.nonzero().max() == real.nonzero().max()
        assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()


def test_prompt_of_training_is_the_prompt_of_generation(collator):
    training, prompts = collator.training(EXAMPLES), collator.prompts(EXAMPLES)
    for row in range(len(EXAMPLES)):
        question = (training["attention_mask"][row] == 1) & (training["labels"][row] == IGNORED)
        asked = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        assert torch.equal(training["input_ids"][row][question], asked)
    assert (prompts["attention_mask"].diff(dim=1) >= 0).all()


def test_collator_writes_what_the_processor_writes(collator, tokenizer, tiny_config):
    config = tiny_config()
    for example in EXAMPLES:
        kinds = [ref.kind for ref in example.media]
        prompt = build_prompt(example.question, kinds)
        text = tokenize_text(prompt, tokenizer, config.media_token_ids)
        soft = [config.num_soft_tokens(kind) for kind in kinds]
        expected = text.expanded(config.media_token_ids, soft).ids
        assert collator.prompts([example])["input_ids"][0].tolist() == expected


def test_model_takes_batches_and_media_come_row_by_row(collator, bank, tiny_model):
    batch = collator.training(EXAMPLES)
    assert torch.equal(batch["image_features"], bank.sets["pictures"][[3, 1, 4, 0]].float())
    model = tiny_model()
    together = model(**batch)
    assert torch.isfinite(together.loss)
    for row, example in enumerate(EXAMPLES):
        single = collator.training([example])
        length = single["input_ids"].shape[1]
        logits = model(**single).logits[0]
        assert torch.allclose(together.logits[row, :length], logits, atol=1e-4)


def test_query_states_go_under_their_own_name(tokenizer, tiny_config, bank):
    batch = Collator(tokenizer, tiny_config(), bank, ("speech",)).training(EXAMPLES)
    assert "speech_query_states" in batch
    assert "speech_features" not in batch
    assert "image_features" in batch


TASKS = {name: [Example(name, f"{name} {i}", "yes") for i in range(20)] for name in "abc"}


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), size=st.integers(1, 30))
def test_batch_is_a_function_of_seed_and_step(seed, step, size):
    weights = {"a": 1, "b": 0.5}
    batch = Mixture(TASKS, weights, (seed, 1)).batch(step, size)
    again = Mixture(TASKS, weights, (seed, 1))
    again.batch(step + 1, 7)
    assert again.batch(step, size) == batch
    assert len(batch) == size
    assert {example.task for example in batch} <= {"a", "b"}


def test_steps_stages_and_seeds_differ():
    batches = [
        Mixture(TASKS, {"a": 1}, seed).batch(step, 8)
        for seed in ((0, 0), (0, 1), (1, 0))
        for step in (0, 1)
    ]
    assert len({tuple(batch) for batch in batches}) == len(batches)


def test_shares_follow_the_weights():
    mixture = Mixture(TASKS, {"a": 3, "b": 1}, (0,))
    counts = Counter(e.task for step in range(40) for e in mixture.batch(step, 100))
    assert counts["a"] / counts.total() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"z": 1}, r"task \(z\) must be one with examples: \['a', 'b', 'c'\]"),
        ({"empty": 1}, r"task \(empty\)"),
        ({"a": 0}, r"weight of task a \(0\) must be positive"),
    ],
)
def test_mixture_checks_its_tasks(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(TASKS | {"empty": []}, weights, (0,))
