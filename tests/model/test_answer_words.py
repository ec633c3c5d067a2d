"""The labels of the objective `words` are the tokens that answers have within a text."""

import pytest
from llms import CHATML, INST, THINKING, chat_tokenizer

from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS
from unimoe_model.tokenization import IGNORED, TokenizedText, tokenize_chat
from unimoe_model.training.answer_words import answers_within_text
from unimoe_model.training.batches import Batches, sample_order
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe import Stage

TURNS = (("what color is it?", "red"), ("how high?", "low, assistant"))


@pytest.fixture
def chat():
    def build(template, **options):
        made = chat_tokenizer(template, **options)
        made.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
        made.pad_token = made.eos_token
        return made

    return build


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_answers_of_a_chat_get_the_tokens_of_a_text(chat, template):
    own = chat(template)
    plain = tokenize_chat(TURNS, own)
    end = own.convert_tokens_to_ids("<|im_end|>")
    text = answers_within_text(plain, own, {end})
    expected = [token for _, answer in TURNS for token in (*own(f" {answer}")["input_ids"], end)]
    assert [label for label in text.labels if label != IGNORED] == expected
    assert expected != [label for label in plain.labels if label != IGNORED]
    asked, others = (
        [token for token, label in zip(t.ids, t.labels, strict=True) if label == IGNORED]
        for t in (plain, text)
    )
    assert asked == others
    assert all(
        label in (IGNORED, token) for token, label in zip(text.ids, text.labels, strict=True)
    )


def test_answers_that_have_a_space_before_them_stay(chat, tokenizer, tiny_config):
    own = chat(INST, bos_token="<s>")
    text = tokenize_chat(TURNS, own)
    assert answers_within_text(text, own, {own.eos_token_id}) == text
    published = UniMoEProcessor.from_config(tiny_config(), tokenizer)
    text = published.tokenize(TURNS)
    assert answers_within_text(text, published.tokenizer, published.stop_token_ids) == text


def test_answers_without_words_stay(chat):
    own = chat(CHATML)
    end = own.convert_tokens_to_ids("<|im_end|>")
    for text in (TokenizedText([end, end], [IGNORED, end]), TokenizedText([], [])):
        assert answers_within_text(text, own, {end}) == text


def test_only_the_objective_of_words_changes_batches(chat, tiny_config):
    own = chat(CHATML)
    processor = UniMoEProcessor.from_config(tiny_config(), own, prompt_format="chat")
    found = {}
    for objective in ("answers", "words"):
        settings = Optimization(1, 1, 1.0)
        made = Stage("s", "m", (), ({"own": 1},), settings, epochs=1, objective=objective)
        order = sample_order(made, {"own": [_Sample()]}, 0)
        (part,) = Batches(processor, order, made, settings, lambda kind, path: None)(0)
        labels = part["labels"][0]
        found[objective] = own.decode(labels[labels != IGNORED])
    assert found == {"answers": "red<|im_end|>", "words": " red<|im_end|>"}


class _Sample:
    turns, media = TURNS[:1], ()
