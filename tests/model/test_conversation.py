"""Conversations: the cache between turns, streaming, stopping, limits and sampling."""

import threading

import pytest
import torch
from conversing import Checked, Seen, anew, keep_to_words, processor_of, says, wait
from transformers import TextIteratorStreamer, TextStreamer

from unimoe_model.chat.conversation import ContextFullError, Conversation
from unimoe_model.chat.sampling import Sampling
from unimoe_model.data.encoded_media import EncodedMedia


@pytest.fixture
def model(tiny_model, tokenizer):
    """In float64, because a cached step differs from an uncached pass in the last bits."""
    model = tiny_model(text_config={"max_position_embeddings": 4096}).double()
    return keep_to_words(model, tokenizer)


@pytest.fixture
def processor(model, tokenizer, encoders):
    return processor_of(model, tokenizer)


@pytest.fixture
def item(features):
    def build(kind, seed=0, pieces=1):
        return EncodedMedia(tuple(features(kind, pieces, seed=seed)))

    return build


def said(pieces):
    return "".join(pieces)


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_streamed_text_is_the_text_of_generate(
    tiny_model, tokenizer, media_prompt, features, words, seed, capsys
):
    """Of words, and of any bytes, which are no characters by themselves."""
    inputs = {
        "input_ids": media_prompt("image", "speech"),
        "image_features": features("image", seed=seed),
        "speech_features": features("speech", seed=seed),
    }
    model = keep_to_words(tiny_model(), tokenizer) if words else tiny_model()
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    produced = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(produced, skip_special_tokens=True)
    assert expected.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **options, streamer=streamer)
    pieces = list(streamer)
    assert said(pieces) == expected
    assert not words or len([piece for piece in pieces if piece]) == 24
    capsys.readouterr()
    printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **options, streamer=printer)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_follow_up_computes_the_new_tokens_alone(model, processor, item):
    checked = Checked(model, processor)
    replies = [checked.reply("what shape is it?", images=[item("image")])]
    assert checked.prefilled == checked.whole
    for text, media in (
        ("yes or no?", {}),
        ("", {"speech": [item("speech", pieces=2)]}),
        ("which word?", {"images": [item("image", 1)], "audio": [item("audio")]}),
        ("a red circle?", {}),
    ):
        before = checked.whole
        replies.append(checked.reply(text, **media))
        # The last of the reply's 6 tokens was never given to the LLM.
        assert checked.prefilled == checked.whole - (before + 5)
    assert len(set(replies)) == len(replies)


def test_media_may_stand_where_placeholders_say(model, processor, item):
    checked = Checked(model, processor)
    checked.reply("is <image> red, and <image>?", images=[item("image"), item("image", 1)])
    checked.reply("<speech> or <image>?", images=[item("image", 2)], speech=[item("speech")])
    before = checked.conversation.turns
    with pytest.raises(ValueError, match="text holds 1 <image> but 2 image items were given"):
        checked.conversation.reply("<image>?", images=[item("image"), item("image", 1)])
    assert checked.conversation.turns == before
    checked.reply("which word?")


def test_another_picture_at_the_same_place_is_seen(model, processor, item):
    """The first message is dropped, because its reply has no text; the next has the same ids."""
    end = processor.tokenizer.eos_token_id
    first, second = item("image"), item("image", 1)
    expected = [
        anew(model, processor, [("<image>\nwhat?", None)], {"image": [picture]}, 6)[0]
        for picture in (first, second)
    ]
    assert expected[0] != expected[1]
    conversation = Conversation(model, processor, max_new_tokens=6)
    with says(model, [end]):
        assert said(conversation.reply("what?", images=[first])) == ""
    assert conversation.turns == ()
    assert conversation.ending == "end"
    assert said(conversation.reply("what?", images=[second])) == expected[1]


def test_the_same_prompt_again_is_computed_from_its_last_token(model, processor, item):
    conversation = Conversation(model, processor, max_new_tokens=6)
    media = {"images": [item("image")]}
    with says(model, [processor.tokenizer.eos_token_id]):
        assert said(conversation.reply("what?", **media)) == ""
    expected = anew(model, processor, [("<image>\nwhat?", None)], {"image": media["images"]}, 6)[0]
    seen = Seen(model)
    assert said(conversation.reply("what?", **media)) == expected
    assert seen.lengths == [1] * 6


def test_a_reply_that_is_tokenized_otherwise_is_computed_again(model, processor, tokenizer):
    """The model spells " red" in two tokens; the prompt has it as one."""
    spelled = [tokenizer.convert_tokens_to_ids(token) for token in ("Ġ", "red", "Ġno")]
    assert tokenizer.encode(" red no", add_special_tokens=False) != spelled
    checked = Checked(model, processor)
    with says(model, [*spelled, tokenizer.eos_token_id]):
        assert said(checked.conversation.reply("what?")) == "red no"
    first = len(processor.tokenize([("what?", None)]).ids)
    checked.reply("which?")
    assert checked.prefilled == checked.whole - first


def test_reset_forgets(model, processor, item):
    conversation = Conversation(model, processor, max_new_tokens=6)
    seen = Seen(model)
    first = said(conversation.reply("what shape is it?", images=[item("image")]))
    seen.remove()
    whole = sum(seen.lengths)
    said(conversation.reply("yes?"))
    conversation.reset()
    assert conversation.turns == ()
    assert conversation.ending is None
    seen = Seen(model)
    assert said(conversation.reply("what shape is it?", images=[item("image")])) == first
    assert sum(seen.lengths) == whole


def test_words_come_before_the_reply_ends(model, processor):
    """The LLM waits at its fourth step until the first piece was read."""
    read = threading.Event()
    Seen(model, lambda count: wait(read) if count == 4 else None)
    pieces = Conversation(model, processor, max_new_tokens=8).reply("what?")
    first = next(pieces)
    read.set()
    rest = list(pieces)
    assert first + said(rest) == anew(model, processor, [("what?", None)], {}, 8)[0]


def test_a_reply_that_is_stopped_stays_in_the_conversation(model, processor, item):
    checked = Checked(model, processor, max_new_tokens=40)
    conversation = checked.conversation
    media = {"images": [item("image")]}
    whole = anew(model, processor, [("<image>\nwhat?", None)], {"image": media["images"]}, 40)[0]
    seen = Seen(model, lambda count: conversation.stop() if count == 3 else None)
    reply = said(conversation.reply("what?", **media))
    seen.remove()
    assert len(seen.lengths) == 3
    assert conversation.ending == "stopped"
    assert reply == " ".join(whole.split()[:3])
    checked.media["image"] += media["images"]
    before = seen.lengths[0]
    checked.reply("and now?")
    assert checked.prefilled == checked.whole - (before + 2)
    assert conversation.ending == "length"


def test_closing_the_pieces_stops_the_reply(model, processor):
    checked = Checked(model, processor, max_new_tokens=6)
    checked.conversation.max_new_tokens = 4000
    pieces = checked.conversation.reply("what?")
    first = next(pieces)
    pieces.close()
    assert checked.conversation.ending == "stopped"
    ((_, reply),) = checked.conversation.turns
    assert reply.startswith(first)
    assert len(reply.split()) < 4000
    checked.conversation.max_new_tokens = 6
    checked.reply("which word?")


def test_one_reply_at_a_time(model, processor):
    go_on = threading.Event()
    Seen(model, lambda count: wait(go_on) if count == 2 else None)
    conversation = Conversation(model, processor, max_new_tokens=6)
    pieces = conversation.reply("what?")
    with pytest.raises(RuntimeError, match="a reply is being generated"):
        conversation.reply("which?")
    go_on.set()
    assert said(pieces) == anew(model, processor, [("what?", None)], {}, 6)[0]


def test_a_failure_leaves_the_conversation_as_it_was(model, processor):
    def fail(count):
        if count == 3:
            raise RuntimeError("out of memory")

    checked = Checked(model, processor)
    checked.reply("what?")
    before = checked.conversation.turns
    seen = Seen(model, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        said(checked.conversation.reply("which?"))
    seen.remove()
    assert checked.conversation.turns == before
    assert checked.conversation.ending is None
    checked.reply("what shape is it, a red circle?")
    assert checked.prefilled == checked.whole


def test_a_reply_that_would_be_read_as_a_picture_is_refused(model, processor, tokenizer):
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "<image>"]
    checked = Checked(model, processor, max_new_tokens=9)
    expected = "this reply cannot stay in the conversation: text holds 1 <image>"
    with says(model, [*spelled, tokenizer.eos_token_id]), pytest.raises(ValueError, match=expected):
        said(checked.conversation.reply("what?"))
    assert checked.conversation.turns == ()
    checked.reply("which word?")


def test_white_space_around_a_reply_is_left_out(model, processor, tokenizer):
    ids = tokenizer.encode(" \n a red\n circle \n ", add_special_tokens=False)
    conversation = Conversation(model, processor)
    with says(model, [*ids, tokenizer.eos_token_id]):
        assert said(conversation.reply("what?")) == "a red\n circle"
    assert conversation.turns[0][1] == "a red\n circle"


def test_limits_of_a_reply(model, processor):
    conversation = Conversation(model, processor, max_new_tokens=5)
    assert len(said(conversation.reply("what?")).split()) == 5
    assert conversation.ending == "length"
    room = conversation.context - len(processor.tokenize([("what?", None)]).ids)
    model.config.text_config.max_position_embeddings -= room - 3
    conversation.reset()
    assert len(said(conversation.reply("what?")).split()) == 3
    assert conversation.ending == "context"


def test_a_full_context_is_named_and_nothing_is_cut(model, processor, item):
    model.config.text_config.max_position_embeddings = 50
    conversation = Conversation(model, processor, max_new_tokens=4)
    turns, needed, picture = [], 0, item("image")
    while needed < 50:
        said(conversation.reply("what?", images=[picture]))
        turns = [*conversation.turns, ("<image>\nwhat?", None)]
        media = {"image": [picture] * len(turns)}
        needed = len(processor.rows([processor.tokenize(turns)], media)[0].text.ids)
    assert len(turns) > 2
    expected = rf"this message \({needed} tokens\) must be shorter than the model's context \(50\)"
    for _ in range(2):
        with pytest.raises(ContextFullError, match=expected):
            conversation.reply("what?", images=[picture])
    assert [*conversation.turns] == turns[:-1]
    conversation.reset()
    assert said(conversation.reply("what?", images=[picture]))


def test_the_same_seed_gives_the_same_words(model, processor):
    def talk(**options):
        conversation = Conversation(
            model, processor, max_new_tokens=12, sampling=Sampling(**options)
        )
        return [said(conversation.reply(text)) for text in ("what?", "which word?")]

    state = torch.get_rng_state()
    first = talk(temperature=3.0, seed=1)
    torch.rand(5)
    assert talk(temperature=3.0, seed=1) == first
    assert talk(temperature=3.0, seed=2) != first
    assert talk(temperature=3.0) != talk(temperature=3.0)
    assert first[0] != first[1]
    greedy = talk()
    assert talk(seed=3) == greedy != first
    assert talk(temperature=3.0, top_p=1e-6, seed=1) == greedy
    torch.set_rng_state(state)


def test_greedy_whatever_the_model_would_do_by_itself(model, processor):
    expected = said(Conversation(model, processor, max_new_tokens=8).reply("what?"))
    model.generation_config.do_sample = True
    model.generation_config.num_beams = 2
    assert said(Conversation(model, processor, max_new_tokens=8).reply("what?")) == expected


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.5, 0.2, 0.3, 0.0]).log().expand(4000, 4)
    (warper, draw) = Sampling(temperature=0.5, seed=0).processors(scores.device)
    drawn = draw(None, warper(None, scores))
    assert (drawn == 0).sum() == 4000
    assert torch.isinf(drawn[drawn != 0]).all()
    shares = (drawn == 0).float().mean(0)
    expected = torch.tensor([0.25, 0.04, 0.09, 0.0]) / 0.38
    assert (shares - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\) must be from 1e-6 to 1e6"),
        ({"temperature": 1e-7}, r"temperature \(1e-07\) must be from 1e-6 to 1e6"),
        ({"temperature": float("inf")}, r"temperature \(inf\) must be from 1e-6 to 1e6"),
        ({"seed": 2**63}, r"seed \(9223372036854775808\) must be from -2\*\*63 to 2\*\*63 - 1"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be from 1e-6 to 1e6"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p \(0.0\) must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p \(1.5\) must be in \(0, 1\]"),
        ({"top_p": 0.9}, r"top_p \(0.9\) requires a temperature"),
    ],
)
def test_sampling_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_options_that_are_refused(model, processor):
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\) must be at least 1"):
        Conversation(model, processor, max_new_tokens=0)
    with pytest.raises(ValueError, match="question is empty"):
        Conversation(model, processor).reply(" ")
    with pytest.raises(ContextFullError, match=r"model's context \(4096\)"):
        Conversation(model, processor, system="word " * 5000)


def test_a_system_prompt_stands_before_the_first_turn(model, processor):
    conversation = Conversation(model, processor, max_new_tokens=6, system="no red circle")
    first = said(conversation.reply("what?"))
    assert first == anew(model, processor, [("what?", None)], {}, 6, "no red circle")[0]
    assert first != anew(model, processor, [("what?", None)], {}, 6)[0]
