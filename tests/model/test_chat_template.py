"""Conversations in the chat templates of LLMs: ids, labels, and what is refused."""

import pytest
from llms import CHATML, INST, THINKING, chat_tokenizer

from unimoe_model.chat_template import end_of_turn_id
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS
from unimoe_model.tokenization import IGNORED, tokenize_chat

TURNS = [("what color is it?", "red"), ("how high?", "low, assistant")]


@pytest.fixture
def chat():
    def build(template, **options):
        made = chat_tokenizer(template, **options)
        made.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
        return made

    return build


@pytest.fixture
def processor(tiny_config, chat):
    def build(template, **options):
        own = chat(template)
        own.pad_token = own.eos_token
        return UniMoEProcessor.from_config(tiny_config(), own, prompt_format="chat", **options)

    return build


def learned(text, tokenizer):
    """The runs of labelled tokens, as text."""
    runs, inside = [], False
    for token, label in zip(text.ids, text.labels, strict=True):
        if label != IGNORED:
            assert label == token
            runs = [*runs, []] if not inside else runs
            runs[-1].append(token)
        inside = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "options", "answers"),
    [
        (CHATML, {}, ["red<|im_end|>", "low, assistant<|im_end|>"]),
        (THINKING, {}, ["red<|im_end|>", "low, assistant<|im_end|>"]),
        (INST, {"bos_token": "<s>"}, [" red<|endoftext|>", " low, assistant<|endoftext|>"]),
    ],
)
def test_ids_are_the_templates_and_labels_what_a_model_writes(chat, template, options, answers):
    own = chat(template, **options)
    text = tokenize_chat(TURNS, own)
    roles = ("user", "assistant")
    messages = [
        {"role": role, "content": said}
        for turn in TURNS
        for role, said in zip(roles, turn, strict=True)
    ]
    assert text.ids == own.apply_chat_template(messages, return_dict=False, enable_thinking=False)
    assert learned(text, own) == answers
    prompt = tokenize_chat([(TURNS[0][0], None)], own)
    assert set(prompt.labels) == {IGNORED}
    whole = tokenize_chat(TURNS[:1], own)
    assert whole.ids[: len(prompt.ids)] == prompt.ids  # generation starts where labels do
    assert whole.labels[len(prompt.ids)] != IGNORED


def test_processor_writes_questions_and_conversations_in_the_template(processor, encoders):
    made = processor(CHATML, system_prompt="be brief")
    own = made.tokenizer
    image = own.convert_tokens_to_ids("<image>")
    text = made.tokenize([("<image>\nwhat color is it?", "red")])
    assert text.ids.count(image) == 1
    shown = own.decode(text.ids)
    assert shown.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<image>\n")
    from PIL import Image

    row = made.question_row("what color is it?", images=[Image.new("RGB", (20, 20))])
    assert own.decode(row.text.ids).endswith("color is it?<|im_end|>\n<|im_start|>assistant\n")
    assert row.text.ids.count(image) == 3
    assert made.stop_token_ids == [own.eos_token_id, own.convert_tokens_to_ids("<|im_end|>")]
    ids = made("<|im_start|>user\nhow high?")["input_ids"][0].tolist()
    assert ids == own("<|im_start|>user\nhow high?", add_special_tokens=False)["input_ids"]


def test_format_is_saved_with_the_processor(processor, tmp_path):
    processor(CHATML).save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path)
    assert loaded.prompt_format == "chat"
    assert loaded.tokenize(TURNS).ids == processor(CHATML).tokenize(TURNS).ids


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (INST, "be brief", "refuses a conversation of system, user, .*: there is no system"),
        (CHATML.replace("m.content", "m.content | upper"), "", "must show the answer 'red' as it"),
        (CHATML.replace("<|im_end|>", "(end)"), "", "must show the answer 'red' as it is"),
        (CHATML.replace("assistant", "robot"), "", "must show the answer 'red' as it is"),
    ],
)
def test_templates_that_do_not_show_answers_are_refused(chat, template, system, message):
    with pytest.raises(ValueError, match=message):
        tokenize_chat(TURNS, chat(template), system)


def test_bad_formats_are_refused(tiny_config, chat):
    own = chat(None)
    own.pad_token = own.eos_token
    with pytest.raises(ValueError, match=r"prompt_format \('chat'\) requires .* chat template"):
        UniMoEProcessor.from_config(tiny_config(), own, prompt_format="chat")
    with pytest.raises(ValueError, match=r"prompt_format \('llama'\) must be one of"):
        UniMoEProcessor.from_config(tiny_config(), own, prompt_format="llama")
    with pytest.raises(ValueError, match="must hold at least one"):
        tokenize_chat([("", "red")], chat(CHATML))


def test_end_of_turn(chat):
    own = chat(CHATML)
    assert own.convert_ids_to_tokens(end_of_turn_id(own)) == "<|im_end|>"
    assert end_of_turn_id(chat(INST, bos_token="<s>")) == own.eos_token_id
