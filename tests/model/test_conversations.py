"""Training data of every format, the order of its media, and what the processor makes of it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talks import refusal, talk

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.data.conversations import read_conversations
from unimoe_model.evaluation.metrics.choice import with_options
from unimoe_model.evaluation.samples import media_arguments, read_samples
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS, build_prompt, conversation_text
from unimoe_model.tokenization import IGNORED

ARGUMENTS = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}


@pytest.fixture
def processor(tiny_config, tokenizer, encoders):
    return UniMoEProcessor.from_config(tiny_config(), tokenizer)


def grouped(conversation):
    """Media of a conversation as arguments of the processor."""
    return {
        name: [file for held, file in conversation.media if held == kind]
        for kind, name in ARGUMENTS.items()
    }


# Formats


def test_lines_of_questions(write_talks, tmp_path):
    lines = [
        {"id": "é", "question": " what? ", "audio": "q.wav", "image": ["b.png", "a.png"]},
        {"id": 2, "speech": "q.wav"},
        {"id": 3, "question": "here <audio> and <image>?", "image": "a.png", "audio": "q.wav"},
        {"id": 4, "question": "which?", "image": "a.png", "options": ["dog", "cat"]},
    ]
    answers = [{"answer": "x"}, {"answers": ["y", "z"]}, {"answer": "w "}, {"answer": "cat"}]
    lines = [json.dumps(line | answer) for line, answer in zip(lines, answers, strict=True)]
    path = write_talks("\n\n".join(lines), "data.jsonl")
    a, b, q = (tmp_path / name for name in ("a.png", "b.png", "q.wav"))
    chosen = f"<image>\n{with_options('which?', ['dog', 'cat'])}"
    assert list(read_conversations(path)) == [
        Conversation(
            "é",
            f"{path} line 1",
            (("<image>\n<image>\n<audio>\nwhat?", "x"),),
            (("image", b), ("image", a), ("audio", q)),
        ),
        Conversation(2, f"{path} line 3", (("<speech>", "y"),), (("speech", q),)),
        Conversation(
            3,
            f"{path} line 5",
            (("here <audio> and <image>?", "w "),),
            (("audio", q), ("image", a)),
        ),
        Conversation(4, f"{path} line 7", ((chosen, "B"),), (("image", a),)),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r\n\t"])
@pytest.mark.parametrize("indent", [None, 4])
def test_llava_array(write_talks, tmp_path, mark, indent):
    items = [
        talk("what é?\n<image>", "a dog", "why?", "so", id="7", image="a.png", model=""),
        talk("hi", "hello", id="7"),
        talk("again", "yes", data_source="x", tokens=3, multi_info={}),
    ]
    items[1]["conversations"][1] |= {"markdown": None, "text": None}
    path = write_talks(mark + json.dumps(items, indent=indent, ensure_ascii=False).encode())
    assert list(read_conversations(path)) == [
        Conversation(
            "7",
            f"{path} item 1",
            (("what é?\n<image>", "a dog"), ("why?", "so")),
            (("image", tmp_path / "a.png"),),
        ),
        Conversation("7", f"{path} item 2", (("hi", "hello"),)),
        Conversation(3, f"{path} item 3", (("again", "yes"),)),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_conversations(write_talks, tmp_path, mark):
    item = talk("q", "r", video=str(tmp_path / "frames"), image="a.png")
    item["conversations"][0]["from"], item["conversations"][1]["from"] = "user", "assistant"
    asked = {"id": 1, "question": "what?", "answer": "x"}
    lines = [asked, item, talk("s", "t", id=1)]
    path = write_talks(mark + "\r\n".join(map(json.dumps, lines)).encode())
    first, second, third = read_conversations(path)
    assert first == Conversation(1, f"{path} line 1", (("what?", "x"),))
    media = (("image", tmp_path / "a.png"), ("video", tmp_path / "frames"))
    assert second == Conversation(2, f"{path} line 2", (("<image>\n<video>\nq", "r"),), media)
    assert third == Conversation(1, f"{path} line 3", (("s", "t"),))


# Media and the order of their placeholders


def test_media_follow_the_placeholders_of_several_turns(write_talks, tmp_path):
    item = talk(
        "<audio> or <image>?",
        "x",
        "no media",
        "y",
        "<image><audio>",
        "z",
        image=["b.png", "a.png"],
        audio=["q.wav", "a.wav"],
        speech="q.wav",
        video=["frames"],
    )
    write_talks(b"", "a.wav")
    [found] = read_conversations(write_talks([item]))
    assert found.turns[0][0] == "<video>\n<speech>\n<audio> or <image>?"
    assert [user for user, _ in found.turns[1:]] == ["no media", "<image><audio>"]
    names = ["frames", "q.wav", "q.wav", "b.png", "a.png", "a.wav"]
    kinds = ["video", "speech", "audio", "image", "image", "audio"]
    assert found.media == tuple(zip(kinds, (tmp_path / name for name in names), strict=True))


def test_media_alone_may_ask(write_talks):
    [found] = read_conversations(write_talks([talk(" ", "x", image="a.png", speech="q.wav")]))
    assert found.turns == (("<image>\n<speech>", "x"),)


def test_media_folder(write_talks, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "c.png").write_bytes(b"x")
    images = ["c.png", str(tmp_path / "a.png")]
    path = write_talks([talk("q", "r", image=images)])
    [found] = read_conversations(path, folder)
    assert [file for _, file in found.media] == [folder / "c.png", tmp_path / "a.png"]
    line = write_talks(json.dumps({"id": 1, "question": "q", "image": images, "answer": "r"}))
    [found] = read_conversations(line, folder)
    assert [file for _, file in found.media] == [folder / "c.png", tmp_path / "a.png"]
    assert "media_folder" in refusal(path, tmp_path / "none")
    assert "1 media files are missing: item 1 image (c.png)" in refusal(
        write_talks([talk("q", "r", image=images)])
    )


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """A folder of files 0 to 29."""
    folder = tmp_path_factory.mktemp("pool")
    for number in range(30):
        (folder / str(number)).write_bytes(b"")
    return folder


@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(MEDIA_KINDS), st.text(" b<>é\n", max_size=3))),
            st.text(" b<>é\n", max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    bare=st.dictionaries(st.sampled_from(MEDIA_KINDS), st.integers(1, 3)),
)
def test_any_placeholders_keep_their_order(pool, turns, bare):
    turns = [(held[:6], text) for held, text in turns]
    placed = [kind for held, _ in turns for kind, _ in held]
    front = [kind for kind in MEDIA_KINDS if kind not in placed for _ in range(bare.get(kind, 0))]
    expected = [(kind, pool / str(number)) for number, kind in enumerate(front + placed)]
    fields = {kind: [file.name for held, file in expected if held == kind] for kind in MEDIA_KINDS}
    fields = {kind: names for kind, names in fields.items() if names}
    questions = [
        f"a{text}" + "".join(f"{PLACEHOLDERS[kind]}{between}" for kind, between in held)
        for held, text in turns
    ]
    values = [value for question in questions for value in (question, "r")]
    (pool / "data.json").write_text(json.dumps([talk(*values, **fields)]), encoding="utf-8")
    [found] = read_conversations(pool / "data.json")
    assert list(found.media) == expected
    questions[0] = "\n".join([*(PLACEHOLDERS[kind] for kind in front), questions[0]])
    assert [user for user, _ in found.turns] == questions


# What the processor makes of them


def test_the_processor_takes_them(processor, lines, tmp_path):
    items = [
        talk(
            "<image> or\n<speech>",
            "yes",
            "<image>?",
            "no",
            image=["white.png", "red.png"],
            speech="0.wav",
            audio=["1.wav", "2.wav"],
            video="video.gif",
        ),
        talk("what?", "a red circle"),
        talk("what?\n<image>", "yes", image="blue.png"),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(items))
    found = read_conversations(path)
    media = [grouped(item) for item in found]
    joined = {name: [file for held in media for file in held[name]] for name in media[0]}
    batch = processor.training_inputs([item.turns for item in found], **joined)
    pieces = {kind: len(batch[f"{kind}_features"]) for kind in MEDIA_KINDS}
    assert pieces == {"image": 3, "video": 1, "speech": 1, "audio": 2}
    alone = processor("<image><image><image>", images=joined["images"])["image_features"]
    assert [file.name for file in joined["images"]] == ["white.png", "red.png", "blue.png"]
    assert batch["image_features"].equal(alone)


def test_a_line_is_learned_as_it_is_asked(processor, tokenizer, lines, data):
    lines.append({"id": 9, "question": "<audio> what?", "audio": "0.wav", "answer": "yes"})
    path = data(lines)
    for sample, found in zip(read_samples(path), read_conversations(path), strict=True):
        media = media_arguments(sample.media)
        asked = processor.ask(sample.question, **media)
        learned = processor.training_inputs([found.turns], **grouped(found))
        length = asked["input_ids"].shape[1]
        assert learned["input_ids"][:, :length].equal(asked["input_ids"])
        assert learned["labels"][:, :length].eq(IGNORED).all()
        answer = learned["labels"][0, length:]
        assert tokenizer.decode(answer).strip() == f"{sample.answers[0]}</s>"
        kinds = [kind for kind in sample.media for _ in sample.media[kind]]
        prompt = build_prompt(sample.question, [] if "<" in sample.question else kinds)
        assert conversation_text([(found.turns[0][0], None)])[0] == prompt
        features = [name for name in asked if name.endswith("_features")]
        assert len(features) == len(sample.media)
        assert all(learned[name].equal(asked[name]) for name in features)


# Digest


def test_digest_changes_with_bytes_and_sizes_of_media(write_talks, tmp_path):
    (tmp_path / "frames" / "1.png").write_bytes(b"x")

    def digest(content):
        path = write_talks(content)
        return read_conversations(path).digest

    items = [talk("q", "r", image="a.png", video="frames")]
    digests = [digest(items), digest(json.dumps(items, indent=1))]
    (tmp_path / "a.png").write_bytes(b"y")
    assert digest(items) == digests[0]
    (tmp_path / "a.png").write_bytes(b"xx")
    digests.append(digest(items))
    (tmp_path / "frames" / "2.png").write_bytes(b"")
    digests.append(digest(items))
    assert len(set(digests)) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in digests)
