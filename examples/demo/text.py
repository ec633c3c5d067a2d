"""Text for the small LLM: conversations, and textual versions of the other modalities' tasks.

The LLM is pretrained from scratch in place of LLaMA, on conversations (chatterbot-corpus) and on
questions about sentences that describe pictures and sounds. Later stages then only have to connect
the encoders.
"""

import random
from collections.abc import Mapping, Sequence

import yaml

from examples.demo.example import Example
from examples.stand_ins.assets import asset_folder

ASK_PICTURE = "what is in the picture?"
ASK_MOTION = "how does it move?"
ASK_FAMILY = "which family of instruments is this?"
ASK_INSTRUMENT = "what is heard?"
ASK_WORD = "which word is spoken?"
ASK_TRANSCRIPT = "write down what is said."

HELD_OUT_PAIRS = {
    "validation": (
        ("brown", "triangle"),
        ("gray", "circle"),
        ("red", "rectangle"),
        ("teal", "circle"),
    ),
    "test": (
        ("black", "triangle"),
        ("blue", "circle"),
        ("green", "rectangle"),
        ("yellow", "triangle"),
    ),
}
"""Pairs of colour and shape that no training text describes, by the split that uses them."""

_OTHER_WORDS = {
    "color": "pink purple orange white gold silver navy lime violet cyan beige maroon olive coral",
    "shape": "square star cross heart ring arrow oval diamond cube cone crescent hexagon",
}
OTHER_COLORS, OTHER_SHAPES = (words.split() for words in _OTHER_WORDS.values())
"""Words that occur in no picture. Without them, the model memorises the few colour-shape pairs."""

WIDER_EXAMPLES, ASKED_EXAMPLES = 60_000, 20_000
"""Number of drawn examples, too many to memorise."""

_SIMPLE_TEMPLATES = ("is it {color}", "is it a {shape}")

PICTURE_SENTENCES = (
    "the picture shows a {color} {shape}.",
    "there is a {color} {shape} in the picture.",
    "a {shape} is in the picture, and it is {color}.",
    "somebody drew a {shape} and painted it {color}.",
)


def conversations(max_words: int = 12) -> list[tuple[str, str]]:
    """Short English question and answer pairs of chatterbot-corpus, in file order.

    Args:
        max_words: maximum words of a question or an answer.

    Raises:
        MissingAssetError: If chatterbot-corpus is not installed.
    """
    pairs = []
    for path in sorted((asset_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for turns in document["conversations"]:
            if not isinstance(turns, list) or len(turns) < 2:
                continue
            question, answer = str(turns[0]).strip(), str(turns[1]).strip()
            if max(len(question.split()), len(answer.split())) <= max_words:
                pairs.append((question, answer))
    return pairs


def answer_about_picture(question: str, color: str, shape: str) -> str | None:
    """Answers one of easy-vqa's question texts about a single coloured shape.

    Returns:
        The answer, or None if the question assumes something that is absent ("what is the blue
        shape?" for a red one).
    """
    words = set(question.rstrip("?").split())
    if question.startswith("what color") or question.startswith("what is the color"):
        return color if words & {shape, "shape"} else None
    if question.startswith("what shape"):
        return shape
    if question.startswith("what is the"):
        return shape if color in words else None
    present = bool(words & {color, shape})
    negated = bool(words & {"no", "not"})
    return "yes" if present != negated else "no"


def reading_examples(
    questions: Sequence[str], pairs: Sequence[tuple[str, str]], task: str = "text", seed: int = 0
) -> list[Example]:
    """Questions about sentences that describe a picture.

    Most questions about the presence of something would be answered "no"; as many of them are drawn
    as are answered "yes", so that guessing does not pay.

    Args:
        questions: easy-vqa's question texts.
        pairs: (colour, shape) of the sentences.
        task: task name of the examples.
        seed: determines which questions about absent things are drawn.
    """
    rng = random.Random(seed)
    examples = []
    for color, shape in pairs:
        open_questions, present, absent = [], [], []
        for question in questions:
            answer = answer_about_picture(question, color, shape)
            if answer in ("yes", "no"):
                there = bool(set(question.rstrip("?").split()) & {color, shape})
                (present if there else absent).append((question, answer))
            elif answer is not None:
                open_questions.append((question, answer))
        for sentence in PICTURE_SENTENCES:
            described = sentence.format(color=color, shape=shape)
            drawn = rng.sample(absent, min(len(absent), len(present)))
            chosen = open_questions + present + drawn
            examples += [
                Example(task, f"{described} {question}", answer, blind_key=question)
                for question, answer in chosen
            ]
    return examples


def wider_examples(
    questions: Sequence[str], pairs: Sequence[tuple[str, str]], count: int, seed: int = 0
) -> list[Example]:
    """The same questions about more colours and shapes than the pictures have.

    A third of them use the simplest words ("is it blue?"), from which comparison is learnt first.
    About one in four colours and shapes occurs in pictures, but never both in one sentence.

    Args:
        questions: easy-vqa's question texts.
        pairs: (colour, shape) of the pictures; drawn pairs have at least one other word.
        count: number of examples to draw. Half of the yes-no questions are answered "yes".
        seed: seed of the draw.
    """
    rng = random.Random(seed)
    colors, shapes = ({pair[i] for pair in pairs} for i in range(2))
    asked_of_pictures = sorted(
        {
            " ".join(
                "{color}" if word in colors else "{shape}" if word in shapes else word
                for word in question.rstrip("?").split()
            )
            for question in questions
        }
    )
    templates = [*_SIMPLE_TEMPLATES * (len(asked_of_pictures) // 4), *asked_of_pictures]
    known_colors, known_shapes = sorted(colors), sorted(shapes)
    all_colors, all_shapes = [*known_colors, *OTHER_COLORS], [*known_shapes, *OTHER_SHAPES]
    examples = []
    while len(examples) < count:
        color = rng.choice(known_colors if rng.random() < 0.3 else OTHER_COLORS)
        shape = rng.choice(known_shapes if rng.random() < 0.3 else OTHER_SHAPES)
        if color in colors and shape in shapes:
            continue
        template = rng.choice(templates)
        present = rng.random() < 0.5 or "what" in template
        asked = f"{template}?".format(
            color=color if present else rng.choice([c for c in all_colors if c != color]),
            shape=shape if present else rng.choice([s for s in all_shapes if s != shape]),
        )
        answer = answer_about_picture(asked, color, shape)
        sentence = rng.choice(PICTURE_SENTENCES).format(color=color, shape=shape)
        examples.append(Example("wider", f"{sentence} {asked}", answer, blind_key=asked))
    return examples


def trained_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of training texts."""
    held_out = {pair for split in HELD_OUT_PAIRS.values() for pair in split}
    return [pair for pair in pairs if pair not in held_out]


def pretraining_tasks(
    questions: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    families: Mapping[str, str],
    motions: Sequence[str],
    things: Sequence[str],
    words: Sequence[str],
    seed: int,
) -> dict[str, list[Example]]:
    """Builds the text tasks of pretraining.

    Args:
        questions: question texts about pictures.
        pairs: (colour, shape) of the training pictures; held-out pairs are removed.
        families: family by instrument name.
        motions: names of the motions.
        things: names of things that move.
        words: the spoken words.
        seed: determines the random sequences of words to repeat.

    Returns:
        Examples by task name.
    """
    rng = random.Random(seed)
    pairs = trained_pairs(pairs)
    reading = reading_examples(questions, pairs)
    wider = wider_examples(questions, pairs, WIDER_EXAMPLES + ASKED_EXAMPLES, seed)
    asked = [
        Example(
            "asked",
            e.question.removesuffix(e.blind_key) + f'somebody asks: "{e.blind_key}"',
            e.answer,
        )
        for e in wider[WIDER_EXAMPLES:]
    ]
    described = [
        Example("describe", f"{s.format(color=c, shape=h)} {ASK_PICTURE}", f"a {c} {h}")
        for c, h in pairs
        for s in PICTURE_SENTENCES
    ]
    vocabulary = sorted({*words, *(w for q in questions for w in q.rstrip("?").split())})
    said = [*questions, *words] * 4
    said += [" ".join(rng.choices(vocabulary, k=rng.randint(1, 7))) for _ in range(4000)]
    repeat = [Example("repeat", f'somebody says: "{t}". {ASK_TRANSCRIPT}', t) for t in said]
    repeat += [Example("repeat", f'somebody says: "{w}". {ASK_WORD}', w) for w in words] * 20
    sounds = [
        Example("sounds", f"a {name} is playing. {ask}", answer)
        for name, family in families.items()
        for ask, answer in ((ASK_FAMILY, family), (ASK_INSTRUMENT, name))
    ]
    moving = [
        Example("moving", f"the {thing} moves {motion}. {ASK_MOTION}", motion)
        for thing in things
        for motion in motions
    ]
    talk = [Example("talk", question, answer) for question, answer in conversations()]
    return {
        "text": reading,
        "asked": asked,
        "wider": wider[:WIDER_EXAMPLES],
        "describe": described,
        "repeat": repeat,
        "sounds": sounds,
        "moving": moving,
        "talk": talk,
    }
