"""Requests in the OpenAI chat format: what is read, and what is refused by name."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimoe_model.chat.sampling import Sampling
from unimoe_model.serve.openai_request import RequestError, parse_request
from unimoe_model.serve.replies import MediaFile, Message

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}
USER = {"role": "user", "content": "what?"}


def parse(default=None, **fields):
    request = {"model": "m", "messages": [USER]} | fields
    return parse_request(json.dumps(request).encode(), 4, default or Sampling())


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_a_conversation_with_media():
    messages = [
        {"role": "system", "content": "be brief"},
        *user({"type": "text", "text": "which?"}, PICTURE),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        *user(SOUND),
    ]
    asked = parse(messages=messages, stream=True, stream_options={"include_usage": True})
    assert asked.system == "be brief"
    earlier = Message("which?", (MediaFile("image", b"hi"),))
    assert asked.earlier == ((earlier, "red"),)
    assert asked.message == Message("", (MediaFile("speech", b"hi"),))
    assert asked.stream
    assert asked.include_usage


def test_kinds_of_sound_and_video():
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGk="}}
    as_uri = {"data": "data:audio/wav;base64,aGk=", "format": "wav", "kind": "audio"}
    asked = parse(messages=user(video, {"type": "input_audio", "input_audio": as_uri}))
    assert [file.kind for file in asked.message.files] == ["video", "audio"]
    assert {file.content for file in asked.message.files} == {b"hi"}


def test_sampling_and_length():
    assert parse().sampling == Sampling()
    assert parse(temperature=0, top_p=0.5).sampling == Sampling()
    assert parse(temperature=1, top_p=0.5, seed=3).sampling == Sampling(1.0, 0.5, 3)
    warm = Sampling(0.7, 0.9, 1)
    assert parse(warm).sampling == warm
    assert parse(warm, seed=2).sampling == Sampling(0.7, 0.9, 2)
    assert parse(max_tokens=3).max_new_tokens == 3
    assert parse(max_tokens=3, max_completion_tokens=5).max_new_tokens == 5
    assert parse(max_tokens=None).max_new_tokens is None


def test_defaults_of_the_format_are_taken():
    neutral = {"n": 1, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "u"}
    assert parse(**neutral, stop=None).message == Message("what?")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"n": 2}, "n (2) is not served; only 1 is", "n"),
        ({"tools": [{"type": "function"}]}, "tools (", "tools"),
        ({"stop": ["a"]}, "stop (", "stop"),
        ({"guided_json": "{}"}, "guided_json ({}) is not served", "guided_json"),
        ({"model": 3}, "model (3) must be a string", "model"),
        ({"stream": "yes"}, "stream (yes) must be true or false", "stream"),
        ({"max_tokens": 0}, "max_tokens (0) must be at least 1", "max_tokens"),
        ({"max_tokens": True}, "max_tokens (true) must be an integer", "max_tokens"),
        ({"temperature": -1}, "temperature (-1.0) must be from 1e-6 to 1e6", "temperature"),
        ({"temperature": 1, "top_p": 2}, "top_p (2.0) must be in (0, 1]", "top_p"),
        ({"messages": []}, "messages ([]) must be a list of messages", "messages"),
        ({"messages": ["hi"]}, "messages[0] (hi) must be an object", "messages[0]"),
        ({"messages": [USER, USER]}, "role (user) of messages[1] is out of order", "messages[1]"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}]},
            "messages must end with one of the role user",
            "messages",
        ),
        (
            {"messages": [{"role": "system", "content": [PICTURE]}, USER]},
            "messages[0] holds media",
            "messages[0]",
        ),
        ({"messages": user(*[PICTURE] * 5)}, "messages hold 5 media; at most 4", "messages"),
        ({"messages": user({"type": "file"})}, "must be text, image_url, input_audio", None),
        (
            {"messages": user({"type": "input_audio", "input_audio": {"data": "?"}})},
            "data of messages[0].content[0] must be base64",
            None,
        ),
        (
            {"messages": user({"type": "input_audio", "input_audio": {"kind": "song"}})},
            "kind (song) of messages[0].content[0] must be speech or audio",
            None,
        ),
    ],
)
def test_what_is_refused_is_named(fields, message, param):
    with pytest.raises(RequestError) as refused:
        parse(**fields)
    assert message in str(refused.value)
    assert param in (None, refused.value.param)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "https://169.254.169.254/",
        "file:///etc/passwd",
        "ftp://a/b",
        "//a/b.png",
        "/etc/passwd",
        "",
        None,
    ],
)
def test_other_urls_than_data_are_refused_by_name(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(RequestError, match="must be a data URI") as refused:
        parse(messages=user(part))
    assert (url or "") in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"nul", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(RequestError, match="body must be"):
        parse_request(body, 4, Sampling())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["messages", "stream", "max_tokens", "seed", "temperature", "stream_options"]
        ),
        JSON | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON})),
    )
)
def test_whatever_comes_is_read_or_refused(fields):
    """No other error escapes."""
    with contextlib.suppress(RequestError):
        assert isinstance(parse(**fields).message, Message)
