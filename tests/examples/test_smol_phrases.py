"""Phrases that are spoken for the connector to learn to write down."""

from examples.smol.sources.phrases import MOST_WORDS, phrases

TEXTS = ["The owl isn't asleep. It hoots at night, over and over!", "An owl: 2 eyes."] * 2


def test_phrases_are_runs_of_words_that_stay_within_a_sentence():
    found = phrases(TEXTS)
    assert found == phrases(TEXTS)
    assert len(found) == len(set(found))
    sentences = ("the owl isn't asleep", "it hoots at night over and over", "an owl", "eyes")
    for phrase in found:
        assert 1 <= len(phrase.split()) <= MOST_WORDS
        assert any(f" {phrase} " in f" {sentence} " for sentence in sentences)
    assert set(" ".join(found).split()) == set(" ".join(sentences).split())


def test_lengths_vary():
    words = " ".join(f"word{chr(97 + number % 26)}" for number in range(400))
    lengths = {len(phrase.split()) for phrase in phrases([words])}
    assert lengths == set(range(1, MOST_WORDS + 1))


def test_texts_without_words_give_none():
    assert phrases(["", "12 + 3.", "!"]) == []
