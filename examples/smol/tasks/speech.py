"""Speech tasks: words, instructions, transcripts, and questions about pictures."""

import random
from collections.abc import Iterable, Mapping, Sequence

from examples.demo import easy_vqa
from examples.demo.example import Example
from examples.demo.limits import draw
from examples.demo.spoken import QUESTION_VOICES, WORD_VOICES
from examples.demo.text import ASK_TRANSCRIPT, ASK_WORD
from examples.smol.catalogue import Catalogue, is_held_out
from examples.smol.media import MediaPlan
from examples.smol.sizes import Sizes
from examples.smol.sources.phrases import phrases
from examples.smol.spoken_words import ALL_WORDS, NUMBERS

PICTURES_A_QUESTION = 3
_DIGITS = frozenset(NUMBERS[:10])


def training_speech(
    catalogue: Catalogue,
    split: Mapping[str, frozenset[str]],
    plan: MediaPlan,
    sizes: Sizes,
    chat: Sequence[tuple[str, str]],
    written: Iterable[str],
) -> dict[str, list[Example]]:
    """Returns the tasks `word`, `transcript`, `instruction`, `spoken_question` and `spoken_chat`.

    Args:
        catalogue: catalogue with the instructions and the spoken descriptions.
        split: held-out groups of both.
        plan: plan to which the phrases and recordings are added.
        sizes: maximum number of each.
        chat: training prompts and their replies.
        written: texts from which phrases are also spoken.
    """
    voices = QUESTION_VOICES["train"]
    learned = [
        own for own in catalogue.instructions if not is_held_out(split, "instructions", own.group)
    ]
    descriptions = [
        own for own in catalogue.descriptions if not is_held_out(split, "descriptions", own.group)
    ]
    texts = [*easy_vqa.question_texts(), *(own.text for own in learned)]
    known = [(text, voice) for text in texts for voice in voices]
    said = [(own.text, own.answer, voice) for own in learned for voice in voices]
    rng = random.Random("spoken chat")
    others = draw(phrases([*(answer for _, answer in chat), *written]), sizes.phrases)
    other_voices = random.Random("phrases").choices(WORD_VOICES["train"], k=len(others))
    return {
        "word": _words(draw(_word_phrases("train"), sizes.words), plan),
        "transcript": _transcripts(draw(known, sizes.transcripts), plan)
        + _transcripts(list(zip(others, other_voices, strict=True)), plan)
        + _described(descriptions, plan),
        "instruction": _instructions(draw(said, sizes.instructions), plan),
        "spoken_question": _spoken_questions("train", sizes.questions, plan),
        "spoken_chat": [
            Example("spoken_chat", "", answer, (("speech", plan.phrase(text, rng.choice(voices))),))
            for text, answer in draw(chat, sizes.spoken_prompts)
        ],
    }


def held_out_speech(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, sizes: Sizes
) -> dict[str, list[Example]]:
    """Returns tasks about speech in held-out voices, and about speech of people.

    `word`, `transcript`, `instruction` and `spoken_question` are as in training. `digit` and
    `human_word` are words spoken by people, and `human_speech` phrases to be transcribed.
    `new_instruction` has instructions that no training voice speaks.
    """
    voices = QUESTION_VOICES["test"]
    spoken = [(own, voice) for own in catalogue.instructions for voice in voices]
    known, new = [], []
    for own, voice in spoken:
        held_out = is_held_out(split, "instructions", own.group)
        (new if held_out else known).append((own.text, own.answer, voice))
    human = [own for own in catalogue.descriptions if is_held_out(split, "descriptions", own.group)]
    words = [
        Example("human_word", ASK_WORD, own.label, (("speech", plan.recording(own)),))
        for own in catalogue.words
    ]
    return {
        "word": _words(draw(_word_phrases("test"), sizes.held_out), plan),
        "digit": [example for example in words if example.answer in _DIGITS],
        "human_word": [example for example in words if example.answer not in _DIGITS],
        "transcript": _transcripts(
            draw([(text, voice) for text, _, voice in (*known, *new)], sizes.held_out), plan
        ),
        "human_speech": _described([*human, *catalogue.sentences], plan),
        "instruction": _instructions(draw(known, sizes.held_out), plan),
        "new_instruction": _instructions(draw(new, sizes.held_out), plan),
        "spoken_question": _spoken_questions("test", sizes.held_out, plan),
    }


def _word_phrases(split: str) -> list[tuple[str, str]]:
    return [(word, voice) for voice in WORD_VOICES[split] for word in ALL_WORDS]


def _words(phrases: Sequence[tuple[str, str]], plan: MediaPlan) -> list[Example]:
    return [
        Example("word", ASK_WORD, word, (("speech", plan.phrase(word, voice)),), blind_key=ASK_WORD)
        for word, voice in phrases
    ]


def _transcripts(phrases: Sequence[tuple[str, str]], plan: MediaPlan) -> list[Example]:
    return [
        Example("transcript", ASK_TRANSCRIPT, text, (("speech", plan.phrase(text, voice)),))
        for text, voice in phrases
    ]


def _described(items: Sequence, plan: MediaPlan) -> list[Example]:
    return [
        Example("transcript", ASK_TRANSCRIPT, own.label, (("speech", plan.recording(own)),))
        for own in items
    ]


def _instructions(said: Sequence[tuple[str, str, str]], plan: MediaPlan) -> list[Example]:
    return [
        Example("instruction", "", answer, (("speech", plan.phrase(text, voice)),))
        for text, answer, voice in said
    ]


def _spoken_questions(split: str, most: int, plan: MediaPlan) -> list[Example]:
    """Returns questions of easy-VQA, each spoken once per voice, about pictures they belong to."""
    by_text: dict[str, list[easy_vqa.Question]] = {}
    for question in easy_vqa.questions(split):
        by_text.setdefault(question.question, []).append(question)
    paths = easy_vqa.image_paths(split)
    phrases = [(text, voice) for text in sorted(by_text) for voice in QUESTION_VOICES[split]]
    rng = random.Random(f"spoken questions/{split}")
    each = PICTURES_A_QUESTION if split == "train" else 1
    examples = []
    for text, voice in draw(phrases, most):
        asked = rng.sample(by_text[text], min(each, len(by_text[text])))
        for question in asked:
            media = (("image", paths[question.image_index]), ("speech", plan.phrase(text, voice)))
            examples.append(Example("spoken_question", "", question.answer, media, blind_key=text))
    return examples
