"""A tokenizer trained on user text."""

import pytest

from unimoe_model.data.tokenizer import train_tokenizer


def test_tokenizer_is_a_function_of_its_texts():
    texts = ["the red circle is red", "is it a circle?"]
    first, second = (train_tokenizer(iter(texts), 280) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 280
    merged = train_tokenizer(["aaaa"] * 50, 280)
    assert len(merged.encode(" aaaa")) < len(first.encode(" aaaa"))


def test_tokenizer_gives_back_any_text(tokenizer):
    for sample in ("what is 2 + 2?", "Grüße, 世界!", "  two  spaces\nand a line"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_placeholders_and_roles_are_one_token(tokenizer):
    for word in ("<image>", "<video>", "<speech>", "<audio>", "USER:", "ASSISTANT:"):
        ids = tokenizer.encode(f"a{word}b")
        assert tokenizer.convert_tokens_to_ids(word) in ids
        assert tokenizer.decode([tokenizer.convert_tokens_to_ids(word)]) == word


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(ValueError, match=r"vocab_size \(100\) must be at least 265"):
        train_tokenizer(["a"], 100)
