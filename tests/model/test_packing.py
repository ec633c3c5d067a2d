"""Packed rows have the loss and gradients of separate samples."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from test_batches import Rank
from wide import Wide

from unimoe_kernels.testing import relative_error
from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.data.encoded_media import EncodedMedia, Row
from unimoe_model.data.packing import packed, restarting_positions
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.tokenization import IGNORED, TokenizedText
from unimoe_model.training.batches import Batches, sample_order
from unimoe_model.training.loss import answer_loss, count_labels, count_tokens
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe import Stage

SHAPES = {"image": (3, 12), "video": (2, 3, 12), "speech": (6, 16), "audio": (5, 10)}
MOST = 64


def talk(name, *turns, **media):
    pairs = tuple(
        (kind, f"{name}-{kind}-{n}") for kind, count in media.items() for n in range(count)
    )
    return Conversation(name, name, turns, pairs)


TALKS = [
    talk("a", ("<image>\nwhat shape is it?", "circle"), image=1),
    talk("b", ("<speech>", "yes"), ("are you sure?", "no"), speech=1),
    talk("c", ("yes or no?", "no")),
    talk("d", ("<image><image><audio>\nsame?", "no"), image=2, audio=1),
    talk("e", ("what shape?", "a red circle")),
    talk("f", ("<video> which word?", "yes"), video=1),
    talk("g", ("<audio><audio>", "no"), audio=2),
    talk("h", ("?", "a red circle " * 30)),
]


def encoded(kind, name):
    """Features of a file, drawn by its name; recordings of several lengths."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shape = list(SHAPES[kind])
    if kind == "audio":
        shape[0] -= sum(map(ord, name)) % 3
    return EncodedMedia((torch.randn(*shape, generator=generator),))


@pytest.fixture
def batches(tiny_config, tokenizer):
    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer)

    def build(pack, ranks=None, accumulation=1, most=MOST, multiple=1, **fields):
        optimization = Optimization(1, len(TALKS), 1.0, accumulation=accumulation)
        fields |= {"pack": pack, "max_length": most}
        stage = Stage("s", "model", (), ({"some": 1},), optimization, epochs=1, **fields)
        order = sample_order(stage, {"some": TALKS}, 0)
        return Batches(
            processor, order, stage, optimization, encoded, ranks, pad_to_multiple_of=multiple
        )

    return build


@pytest.fixture
def model(tiny_model):
    def build(implementation="eager", **fields):
        made = tiny_model(**{"load_balancing_coef": 0.1, "router_z_coef": 0.01} | fields).double()
        made.set_attn_implementation(implementation)
        return made

    return build


def learned(model, parts):
    """Loss and gradients of parts of a batch, all labels counting alike."""
    model.zero_grad()
    count = sum(count_labels(part) for part in parts)
    with Wide():  # norms and the softmax of eager attention are in float32 otherwise
        losses = [answer_loss(model, part, count) for part in parts]
    sum(losses).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(losses).item(), gradients


def assert_equal(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-9)
    assert one[1].keys() == other[1].keys()
    # The gradient of a key's bias is zero but for rounding: it has no scale of its own.
    largest = max(gradient.abs().max() for gradient in other[1].values())
    for name, gradient in other[1].items():
        scale = max(gradient.abs().max(), 1e-9 * largest)
        assert (one[1][name] - gradient).abs().max() / scale < 1e-9, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", [4, 0])
def test_loss_and_gradients_are_those_of_the_samples_apart(batches, model, implementation, experts):
    made = model(implementation, num_experts=experts)
    (apart,), (together,) = batches(False)(0), batches(True)(0)
    assert len(apart["input_ids"]) == len(TALKS)
    assert 1 < len(together["input_ids"]) < len(TALKS)
    assert "attention_mask" not in together
    assert not together["token_mask"].all()
    assert count_tokens(together) == count_tokens(apart)
    expected = learned(made, [apart])
    for part in ("image", "speech", "audio"):
        assert any(f"{part}_connector" in name for name in expected[1])
    assert_equal(learned(made, [together]), expected)


def test_router_losses_count_in_the_comparison(batches, model):
    (together,) = batches(True)(0)
    with_losses = learned(model(), [together])[1]
    without = learned(model(load_balancing_coef=0.0, router_z_coef=0.0), [together])[1]
    name = "model.language_model.layers.0.mlp.router.weight"
    assert relative_error(with_losses[name], without[name]) > 1e-3


@pytest.mark.parametrize("fault", ["attention", "padding", "labels"])
def test_the_comparison_sees_faults(batches, model, fault):
    made = model()
    (apart,), (together,) = batches(False)(0), batches(True)(0)
    if fault == "attention":
        del together["position_ids"]
    elif fault == "padding":
        del together["token_mask"]
    else:
        starts = together["position_ids"] == 0
        together["labels"][starts] = together["input_ids"][starts]
    with pytest.raises(AssertionError):
        assert_equal(learned(made, [together]), learned(made, [apart]))


def test_one_sample_a_row(batches, model):
    made = model()
    (apart,) = batches(False)(0)
    most = max(int(mask.sum()) for mask in apart["attention_mask"])
    rows = batches(False)._rows(batches(False).samples(0))
    single = [packed([row], most)[0] for row in rows]
    together = dict(batches(True)._processor.collate(single))
    assert together["input_ids"].equal(apart["input_ids"])
    assert_equal(learned(made, [together]), learned(made, [apart]))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("accumulation", "fields"), [(2, {}), (1, {"part_tokens": MOST})])
def test_shares_of_processes_and_parts_are_the_batch(batches, model, world, accumulation, fields):
    made = model(load_balancing_coef=0.0, router_z_coef=0.0)
    shares = [batches(True, Rank(r, world), accumulation, **fields)(0) for r in range(world)]
    assert len({len(parts) for parts in shares}) == 1
    expected = learned(made, batches(False)(0))
    assert_equal(learned(made, [part for parts in shares for part in parts]), expected)


def test_rows_are_a_function_of_the_step(batches):
    made = batches(True)
    made(5)
    for name, value in made(2)[0].items():
        assert value.equal(batches(True)(2)[0][name])


def test_long_samples_are_cut(batches):
    (together,) = batches(True, most=20)(0)
    assert together["input_ids"].shape[1] == 20


def test_whole_batches_are_not_packed(batches):
    assert batches(True).whole(0)["attention_mask"].shape[0] == len(TALKS)


def row(number, length):
    return Row(TokenizedText([number] * length, [number] * length), ((str(number), None),))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    least=st.integers(1, 4),
    side=st.sampled_from(["left", "right"]),
)
def test_every_row_has_its_place(lengths, least, side):
    rows = packed([row(n, length) for n, length in enumerate(lengths)], 30, least)
    assert len(rows) >= min(least, len(lengths))
    found = {}
    for made in rows:
        assert sum(made.lengths) == len(made.text.ids) == len(made.text.labels) <= 30
        order = list(dict.fromkeys(made.text.ids))
        assert order == sorted(order) == [int(name) for name, _ in made.media]
        found |= dict(zip(order, made.lengths, strict=True))
        ends = torch.tensor([0, *made.lengths]).cumsum(0)[:-1].tolist()
        assert [made.text.labels[at] for at in ends] == [IGNORED] * len(ends)
    assert [found[number] for number in range(len(lengths))] == lengths
    width = max(len(made.text.ids) for made in rows) + 2
    positions = restarting_positions([made.lengths for made in rows], width, side)
    assert positions.shape == (len(rows), width)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), most=st.integers(30, 99))
def test_rows_are_as_few_as_first_fit_makes_and_short(lengths, most):
    rows = packed([row(n, length) for n, length in enumerate(lengths)], most)
    room = []
    for length in lengths:
        place = next((at for at, left in enumerate(room) if left >= length), len(room))
        room += [most] * (place == len(room))
        room[place] -= length
    assert len(rows) == len(room)
    widest = max(len(made.text.ids) for made in rows)
    assert widest <= most - min(room)


def test_no_row_is_left_half_empty():
    rows = packed([row(n, 10) for n in range(10)], 80)
    assert [len(made.text.ids) for made in rows] == [50, 50]
    rows = packed([row(n, length) for n, length in enumerate([6, 5, 4, 3, 2])], 10)
    assert [made.lengths for made in rows] == [(6, 4), (5, 3, 2)]


def test_positions_begin_at_0_for_each_conversation_and_for_padding():
    assert restarting_positions([(2, 3), (4,)], 6, "right").tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 1, 2, 3, 0, 1],
    ]
    assert restarting_positions([(2, 3)], 6, "left").tolist() == [[0, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize("most", [20, 40, 64])
def test_packed_rows_are_padded_to_few_lengths(batches, most):
    """And every label is where it was."""
    exact, padded = (batches(True, accumulation=2, most=most, multiple=m)(0) for m in (1, 16))
    for own, part in zip(exact, padded, strict=True):
        length, least = part["labels"].shape[1], own["labels"].shape[1]
        assert length == min(most, 16 * math.ceil(least / 16))
        assert torch.equal(part["labels"][:, :least], own["labels"])
        assert not part["token_mask"][:, least:].any()
