"""Batches of a stage: samples of a step, its parts, and the share of each process."""

import pytest
import torch

from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.tokenization import IGNORED
from unimoe_model.training.batches import Batches, sample_order
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import Stage

PIXELS = torch.arange(3 * 4 * 3, dtype=torch.uint8).reshape(4, 3, 3)
CONVERSATIONS = [
    Conversation("a", "a", (("<image>\nwhat shape is it?", "circle"),), (("image", "red"),)),
    Conversation("b", "b", (("<speech>", "yes"), ("are you sure?", "no")), (("speech", "q"),)),
    Conversation("c", "c", (("yes or no?", "no"),)),
    Conversation(
        "d", "d", (("<image><audio>\nsame?", "no"),), (("image", "blue"), ("audio", "pluck"))
    ),
    Conversation("e", "e", (("what shape?", "a red circle"),)),
]


class Rank(Ranks):
    """One of several processes that do not exist."""

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.world_size = rank, world_size


@pytest.fixture
def processor(tiny_config, tokenizer, encoders):
    return UniMoEProcessor.from_config(tiny_config(), tokenizer)


@pytest.fixture
def features(processor):
    """Features of a file, which is named by what is in it."""
    items = {
        "red": PIXELS,
        "blue": 255 - PIXELS,
        "q": torch.linspace(-1, 1, 50).numpy(),
        "pluck": (torch.linspace(-0.5, 1, 70).numpy(), 44100),
    }
    return lambda kind, path: processor.encode(kind, items[path])


@pytest.fixture
def batches(processor, features):
    def build(batch_size=5, ranks=None, accumulation=1, **fields):
        optimization = Optimization(1, batch_size, 1.0, accumulation=accumulation)
        streams = ({"some": 1},)
        stage = Stage("s", "model", (), streams, optimization, epochs=1, **fields)
        order = sample_order(stage, {"some": CONVERSATIONS}, 0)
        return Batches(processor, order, stage, optimization, features, ranks)

    return build


def rows_of(batch):
    """What each row of a batch holds, its padding left out."""
    return [
        (tuple(ids[mask == 1].tolist()), tuple(labels[mask == 1].tolist()))
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        )
    ]


def test_the_prompt_of_training_is_the_prompt_of_generation(batches, processor):
    asked = {
        "what shape is it?": {"images": [PIXELS]},
        "yes or no?": {},
        "<image><audio>\nsame?": {
            "images": [255 - PIXELS],
            "audio": [(torch.linspace(-0.5, 1, 70).numpy(), 44100)],
        },
    }
    rows = rows_of(batches().whole(0))
    for question, media in asked.items():
        prompt = tuple(processor.question_row(question, **media).text.ids)
        (found,) = [row for row in rows if row[0][: len(prompt)] == prompt]
        ids, labels = found
        assert set(labels[: len(prompt)]) == {IGNORED}
        assert labels[len(prompt) :] == ids[len(prompt) :]
        assert ids[-1] == processor.tokenizer.eos_token_id


def test_media_come_row_by_row_in_the_order_of_their_placeholders(batches, features, processor):
    batch = batches().whole(0)
    assert batch["image_features"].shape == (2, 3, 12)
    expected = {name: features("image", name).pieces[0] for name in ("red", "blue")}
    token = processor.tokenizer.convert_tokens_to_ids("<audio>")
    holds_audio = (batch["input_ids"] == token).any(1)
    holds_image = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).any(
        1
    )
    order = ["blue" if audio else "red" for audio in holds_audio[holds_image]]
    assert torch.equal(batch["image_features"], torch.stack([expected[name] for name in order]))


def test_a_model_gives_a_row_the_same_logits_alone_and_in_the_batch(batches, processor, tiny_model):
    model, made = tiny_model(), batches()
    together = model(**made.whole(0)).logits
    rows = made._rows(made.samples(0))
    for number, row in enumerate(rows):
        alone = model(**processor.collate([row])).logits[0]
        assert torch.allclose(together[number, : len(row.text.ids)], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("world", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (5, 1)]
)
def test_shares_of_processes_and_parts_make_the_batch(batches, world, accumulation):
    whole = rows_of(batches().whole(3))
    shares = [batches(ranks=Rank(r, world), accumulation=accumulation)(3) for r in range(world)]
    assert {len(parts) for parts in shares} == {accumulation}
    found = [row for parts in shares for part in parts for row in rows_of(part)]
    assert sorted(found) == sorted(whole)


@pytest.mark.parametrize("world", [1, 2])
def test_parts_hold_no_more_tokens_than_they_may(batches, world):
    whole = rows_of(batches().whole(0))
    most = max(len(ids) for ids, _ in whole)
    shares = [batches(ranks=Rank(rank, world), part_tokens=most)(0) for rank in range(world)]
    assert len({len(parts) for parts in shares}) == 1
    assert len(shares[0]) > 1
    found = []
    for part in (part for parts in shares for part in parts):
        rows = rows_of(part)
        # The last part takes the rows that are too few for a part of all processes.
        assert len(rows) == 1 or part["input_ids"].numel() <= most * (1 if world == 1 else 2)
        found += rows
    assert sorted(found) == sorted(whole)


def test_long_samples_are_cut(batches):
    whole = batches(max_length=9).whole(0)
    assert whole["input_ids"].shape[1] <= 9


def test_fewer_samples_than_processes_are_refused(batches):
    message = r"batch_size \(2\) must be at least the number of processes \(3\)"
    with pytest.raises(ValueError, match=message):
        batches(batch_size=2, ranks=Rank(0, 3))(0)


def test_a_stage_names_the_samples_of_its_data(batches):
    made = batches()
    assert [s.id for s in made.samples(0)] != [s.id for s in made.samples(1)]
    assert sorted(s.id for s in made.samples(1)) == list("abcde")
