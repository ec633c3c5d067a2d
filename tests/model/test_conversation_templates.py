"""Conversations in chat templates of LLMs, with sliding windows, gates and experts of their own."""

import pytest
from conversing import Checked, anew, processor_of
from llms import CHATML, INST, THINKING, chat_tokenizer, llm_fields

from unimoe_model.chat.conversation import Conversation
from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.prompt import PLACEHOLDERS

BOS = {"bos_token": "<s>"}


@pytest.fixture
def checked(tiny_model, features, encoders):
    """A conversation with an LLM of a family, whose replies are letters and spaces."""

    def build(family, template, tokenizer_options=None, fields=None):
        tokenizer = chat_tokenizer(template, **(tokenizer_options or {}))
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
        ids = {kind: tokenizer.convert_tokens_to_ids(p) for kind, p in PLACEHOLDERS.items()}
        fields = dict(fields or {})
        text = llm_fields(family, len(tokenizer), max_position_embeddings=512)
        text |= fields.pop("text_config", {})
        model = tiny_model(text_config=text, media_token_ids=ids, **fields).double()
        allowed = [
            token
            for token in range(len(tokenizer))
            if tokenizer.decode([token]).replace(" ", "").isalpha()
            and tokenizer.decode([token]).isascii()
        ]
        model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - {*allowed})
        return Checked(model, processor_of(model, tokenizer, prompt_format="chat"))

    return build


def talk(checked, features):
    def item(kind, seed=0):
        return EncodedMedia(tuple(features(kind, seed=seed)))

    replies = []
    for text, media in (
        ("what color is it?", {"images": [item("image")]}),
        ("how high?", {}),
        ("", {"speech": [item("speech")], "images": [item("image", 1)]}),
        ("is it red?", {"audio": [item("audio")]}),
    ):
        before = checked.whole
        replies.append(checked.reply(text, **media))
        yield before
    assert len(set(replies)) == len(replies)


@pytest.mark.parametrize(
    ("family", "template", "options", "fields"),
    [
        ("llama", CHATML, {}, {}),
        ("llama", CHATML, {}, {"modality_gate": True, "num_experts": 8}),
        ("mistral", INST, BOS, {"text_config": {"sliding_window": 16}}),
        ("gemma3_text", CHATML, BOS, {"text_config": {"sliding_window": 16}}),
        ("qwen3_moe", CHATML, {}, {"num_experts": 0}),
        ("mixtral", CHATML, {}, {"num_experts": 0}),
    ],
)
def test_replies_are_those_to_the_whole_conversation(
    checked, features, family, template, options, fields
):
    conversation = checked(family, template, options, fields)
    for before in talk(conversation, features):
        # Windows that are full cannot go back where a reply is tokenized otherwise.
        if before and "text_config" not in fields:
            assert conversation.prefilled <= conversation.whole - before


def test_a_template_that_writes_earlier_turns_otherwise(checked, features):
    """The empty thoughts stand before the last reply alone: it is computed again without them."""
    conversation = checked("qwen3", THINKING)
    thoughts = len(conversation.processor.tokenizer.encode("<think>\n\n</think>\n\n"))
    for before in talk(conversation, features):
        if before:
            kept = conversation.whole - conversation.prefilled
            assert before - 2 * thoughts <= kept <= before - thoughts + 1


def test_a_system_prompt_that_the_template_refuses(checked):
    conversation = checked("mistral", INST, BOS).conversation
    with pytest.raises(ValueError, match="there is no system"):
        Conversation(conversation.model, conversation.processor, system="be brief")


def test_a_reply_ends_with_the_end_of_turn_of_the_template(checked):
    conversation = checked("qwen3", CHATML)
    model, processor = conversation.model, conversation.processor
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.suppress_tokens = [
        token for token in range(model.config.text_config.vocab_size) if token != end
    ]
    assert "".join(conversation.conversation.reply("how high?")) == ""
    assert conversation.conversation.ending == "end"
    assert anew(model, processor, [("how high?", None)], {}, 6)[0] == ""
