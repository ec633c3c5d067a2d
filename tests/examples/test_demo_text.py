"""The demo's text tasks, for pretraining the language model."""

import pytest

from examples.demo import text
from examples.demo.text import answer_about_picture, pretraining_tasks, reading_examples

QUESTIONS = [
    "what color is the circle?",
    "what color is the shape?",
    "what is the color of the rectangle?",
    "what shape is in the image?",
    "what is the red shape?",
    "is there a circle?",
    "is there not a circle?",
    "does the image contain a red shape?",
    "is no red shape present?",
    "is there a triangle?",
    "is there a blue shape?",
]
HELD_OUT_PAIRS = [pair for split in text.HELD_OUT_PAIRS.values() for pair in split]
COLOR_SHAPES = [("red", "circle"), ("blue", "rectangle"), *HELD_OUT_PAIRS]


def described_in(example):
    """Colour and shape pairs of the sentences of an example."""
    pairs = [
        (c, s)
        for c, s in COLOR_SHAPES
        for p in text.PICTURE_SENTENCES
        if p.format(color=c, shape=s) in example.question
    ]
    return set(pairs)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what color is the circle?", "red"),
        ("what color is the shape?", "red"),
        ("what is the color of the rectangle?", None),
        ("what shape is in the image?", "circle"),
        ("what is the red shape?", "circle"),
        ("what is the blue shape?", None),
        ("is there a circle?", "yes"),
        ("is there a triangle?", "no"),
        ("is there not a circle?", "no"),
        ("is no blue shape present?", "yes"),
        ("does the image contain a red shape?", "yes"),
    ],
)
def test_answers_about_a_red_circle(question, answer):
    assert answer_about_picture(question, "red", "circle") == answer


def test_reading_examples_balance_what_is_absent():
    pairs = [("red", "circle"), ("blue", "rectangle")]
    absent = [f"is there a {c} thing?" for c in ("teal", "gray", "pink", "lime", "gold", "navy")]
    questions = ["is there a circle?", "is there a red shape?", *absent]
    examples = reading_examples(questions, pairs)
    assert examples == reading_examples(questions, pairs)
    answers = [e.answer for e in examples if ("red", "circle") in described_in(e)]
    assert answers.count("yes") == 2 * len(text.PICTURE_SENTENCES)
    assert answers.count("no") == answers.count("yes")
    assert all(e.question.endswith(e.blind_key) for e in examples)


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(text, "conversations", lambda: [("hello", "hi there")])
    monkeypatch.setattr(text, "WIDER_EXAMPLES", 600)
    monkeypatch.setattr(text, "ASKED_EXAMPLES", 200)
    arguments = {
        "questions": QUESTIONS * 4,
        "pairs": COLOR_SHAPES,
        "families": {"violin": "strings"},
        "motions": ("up", "down"),
        "things": ["red ball"],
        "words": ["go", "stop"],
    }
    return lambda seed: pretraining_tasks(**arguments, seed=seed)


def test_pretraining_tasks_depend_on_the_seed_alone(tasks):
    assert tasks(1) == tasks(1)
    assert tasks(1)["repeat"] != tasks(2)["repeat"]
    assert set(tasks(0)) == {
        "text",
        "asked",
        "wider",
        "describe",
        "repeat",
        "sounds",
        "moving",
        "talk",
    }


def test_held_out_pairs_are_in_no_pretraining_text(tasks):
    made = tasks(0)
    described = {pair for examples in made.values() for e in examples for pair in described_in(e)}
    assert described == {("red", "circle"), ("blue", "rectangle")}


def test_wider_text_cannot_be_guessed_or_learnt_by_heart(tasks):
    made = tasks(0)
    assert (len(made["wider"]), len(made["asked"])) == (600, 200)
    for example in made["wider"]:
        color, shape = (
            {word for word in words if word in example.question.split(".")[0]}
            for words in (text.OTHER_COLORS, text.OTHER_SHAPES)
        )
        assert color or shape
    answers = [e.answer for e in made["wider"]]
    yes, no = answers.count("yes"), answers.count("no")
    assert abs(yes - no) < 0.15 * (yes + no)
    assert yes + no < len(answers)


def test_twins_of_the_other_modalities_are_right(tasks):
    made = tasks(0)
    sounds = {e.question: e.answer for e in made["sounds"]}
    assert sounds[f"a violin is playing. {text.ASK_FAMILY}"] == "strings"
    assert sounds[f"a violin is playing. {text.ASK_INSTRUMENT}"] == "violin"
    assert {e.answer for e in made["moving"]} == {"up", "down"}
    for example in made["repeat"]:
        assert f'"{example.answer}"' in example.question
    for example in made["asked"]:
        assert "somebody asks:" in example.question


def test_wider_examples_ask_what_no_picture_shows():
    pairs = [("red", "circle"), ("blue", "rectangle")]
    examples = text.wider_examples(QUESTIONS, pairs, count=400)
    assert len(examples) == 400
    assert examples == text.wider_examples(QUESTIONS, pairs, count=400)
    others = {*text.OTHER_COLORS, *text.OTHER_SHAPES}
    for example in examples:
        sentence, asked = example.question.removesuffix("?").split(". ")
        told = set(sentence.replace(",", "").split())
        assert told & others
        if example.answer in ("yes", "no"):
            named = set(asked.split()) & {*others, "red", "blue", "circle", "rectangle"}
            negated = {"no", "not"} & set(asked.split())
            assert (example.answer == "yes") == (bool(named & told) != bool(negated))
        else:
            assert example.answer in told
    yes_no = [e.answer for e in examples if e.answer in ("yes", "no")]
    assert 0.4 < yes_no.count("yes") / len(yes_no) < 0.6


def test_held_out_pairs_are_in_one_split_and_leave_every_word_in_training():
    assert len(set(HELD_OUT_PAIRS)) == len(HELD_OUT_PAIRS)
    for color in {c for c, _ in HELD_OUT_PAIRS}:
        assert sum(c == color for c, _ in HELD_OUT_PAIRS) <= 2
