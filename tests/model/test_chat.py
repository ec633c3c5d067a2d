"""`unimoe chat`, in a pseudo-terminal and in a pipe."""

import io
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("pty", reason="there are no pseudo-terminals here")
from conversing import keep_to_words
from PIL import Image
from terminal import Terminal

import unimoe_model
from unimoe_model.chat.conversation import Conversation
from unimoe_model.cli import main
from unimoe_model.generation import Answerer
from unimoe_model.processing import UniMoEProcessor

ENCODERS = "vision: fakes:FakeVision\nspeech: fakes:FakeSpeech\naudio: fakes:FakeAudio\n"


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path, encoders):
    """A folder with a model that generates words without an end, and media for it."""
    model = keep_to_words(tiny_model(text_config={"max_position_embeddings": 100_000}), tokenizer)
    model.save_pretrained(tmp_path / "model")
    processor = UniMoEProcessor.from_config(model.config, tokenizer)
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "encoders.yaml").write_text(ENCODERS)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a blue one.png")
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "turn.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    samples = 3000 * np.sin(np.arange(100))
    with wave.open(str(tmp_path / "asked.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return tmp_path


@pytest.fixture
def terminal(folder):
    def start(*options):
        paths = [Path(unimoe_model.__file__).parents[1], Path(__file__).parent]
        arguments = ["unimoe_model.cli", "chat", "--model", "model", "--encoders", "encoders.yaml"]
        shell = Terminal(folder, [*arguments, *options], {"PYTHONPATH": ":".join(map(str, paths))})
        shell.expect("/help lists the commands, Ctrl-D ends\n> ")
        return shell

    return start


@pytest.fixture
def piped(folder, monkeypatch, capsys):
    """Runs a chat on lines of a pipe; gives exit code, stdout and the lines of stderr."""

    def run(*lines, options=("--max-new-tokens", "4")):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", "--model", "model", *options])
        shown = capsys.readouterr()
        notes = [line for line in shown.err.splitlines() if "Loading weights" not in line]
        return code, shown.out, [note for note in notes if note]

    return run


def replies(folder, *messages, **options):
    """What a conversation replies to messages, each a text and media."""
    answerer = Answerer.from_pretrained(folder / "model")
    conversation = Conversation(answerer.model, answerer.processor, **options)
    return ["".join(conversation.reply(text, **media)) for text, media in messages]


def test_a_session_in_a_terminal(folder, terminal):
    picture, asked = {"images": [folder / "red.png"]}, {"speech": [folder / "asked.wav"]}
    about_picture, follow_up, spoken = replies(
        folder, ("what is it?", picture), ("yes or no?", {}), ("", asked), max_new_tokens=5
    )
    assert len({about_picture, follow_up, spoken}) == 3
    shell = terminal("--max-new-tokens", "5")
    shell.type("/image red.png\n")
    shell.expect("image: 20 x 30 pixels, 3 soft tokens\n> ")
    shell.type("what is it?\n")
    shell.expect(f"{about_picture}\n[cut off after 5 tokens]\n> ")
    shell.type("/image none.png\n")
    shell.expect("image (none.png) must be a file; there is no such file\n> ")
    shell.type("/image broken.png\n")
    shell.expect("image file broken.png must be a whole picture")
    shell.expect("\n> ")
    shell.type("never sent")
    shell.expect("never sent")
    shell.interrupt()
    shell.expect("\n> ")
    shell.type("yes or no?\n")
    shell.expect(f"{follow_up}\n[cut off after 5 tokens]\n> ")
    shell.type("/speech asked.wav\n")
    shell.expect("speech: 0.0 s, 8 soft tokens\n> ")
    shell.type("\n")
    shell.expect(f"{spoken}\n[cut off after 5 tokens]\n> ")
    shell.type("/reset\n")
    shell.expect("the conversation is forgotten\n> ")
    shell.type("/image red.png\n")
    shell.expect("soft tokens\n> ")
    shell.type("what is it?\n")
    shell.expect(f"{about_picture}\n[cut off after 5 tokens]\n> ")
    shell.type("\x04")
    rest, code = shell.end()
    assert rest.strip() == ""
    assert code == 0


def test_ctrl_c_stops_a_reply_alone(folder, terminal):
    """Either reply would take 50000 tokens."""
    (first,) = replies(folder, ("what is it?", {}), max_new_tokens=3)
    shell = terminal("--max-new-tokens", "50000")
    shell.type("what is it?\n")
    shell.expect(first)
    shell.type("\x03")
    shown = shell.expect("\n[stopped]\n> ")
    stopped = f"{first}{shown}".replace("^C", "")  # as the terminal shows the key
    answerer = Answerer.from_pretrained(folder / "model")
    turns = [("what is it?", stopped), ("and now?", None)]
    processor = answerer.processor
    row = processor.rows([processor.tokenize(turns)], {})[0]
    expected = answerer.answer_rows([row], 6)[0]
    shell.type("and now?\n")
    shell.expect(expected)
    shell.type("\x03")
    shell.expect("\n[stopped]\n> ")
    shell.type("\x04")
    assert shell.end()[1] == 0


def test_lines_of_a_pipe_give_replies_alone(folder, piped):
    media = {"images": [folder / "red.png"], "audio": [folder / "asked.wav"]}
    expected = replies(
        folder, ("which?", media), ("", {"speech": [folder / "asked.wav"]}), max_new_tokens=4
    )
    code, shown, notes = piped(
        "", "/image red.png", "/audio asked.wav", "which?", "/speech asked.wav", ""
    )
    assert code == 0
    assert shown == "".join(f"{reply}\n" for reply in expected)
    cut = "[cut off after 4 tokens]"
    assert notes == [
        "image: 20 x 30 pixels, 3 soft tokens",
        "audio: 0.0 s, 12 soft tokens",
        cut,
        "speech: 0.0 s, 8 soft tokens",
        cut,
    ]


def test_files_and_commands_that_are_refused_attach_nothing(folder, piped):
    expected = replies(folder, ("which?", {}), max_new_tokens=4)
    code, shown, notes = piped(
        "/image none.png",
        "/speech red.png",
        "/video asked.wav",
        "/image model",
        "/image",
        "/picture red.png",
        "/quit now",
        "which?",
    )
    assert (code, shown) == (0, f"{expected[0]}\n")
    assert notes[0] == "image (none.png) must be a file; there is no such file"
    assert "red.png" in notes[1]
    assert "asked.wav must be a whole video" in notes[2]
    assert "file model must be" in notes[3]
    assert notes[4] == "/image requires a file: /image FILE"
    assert notes[5] == "unknown command /picture red.png; /help lists them"
    assert notes[6] == "unknown command /quit now; /help lists them"
    assert len(notes) == 8


def test_several_files_and_a_video(folder, piped):
    media = {
        "images": [folder / "red.png", *[folder / "a blue one.png"] * 3],
        "videos": [folder / "turn.gif"],
    }
    expected = replies(folder, ("which?", media), max_new_tokens=4)
    _, shown, notes = piped(
        "/image red.png",
        "/image a blue one.png",
        "/video turn.gif",
        "/image 'a blue one.png'",
        r"/image a\ blue\ one.png",
        "which?",
    )
    assert shown == f"{expected[0]}\n"
    assert notes[2] == "video: 2 frames of 6 x 4 pixels, 3 soft tokens"


def test_a_full_context_proposes_a_reset(folder, piped, tiny_model, tokenizer):
    model = keep_to_words(tiny_model(text_config={"max_position_embeddings": 24}), tokenizer)
    model.save_pretrained(folder / "model")
    code, shown, notes = piped(
        "what?", "/image red.png", "which?", "/reset", "what?", options=("--max-new-tokens", "50")
    )
    first, again = shown.splitlines()
    assert first == again
    assert code == 0
    full = "[cut off: the context of 24 tokens is full; /reset]"
    assert notes[0] == notes[-1] == full
    assert "must be shorter than the model's context (24); /reset forgets" in notes[2]


def test_seeds_and_a_system_prompt(folder, piped):
    def talk(*options):
        return piped("what?", "which?", options=("--max-new-tokens", "8", *options))[1]

    warm = ("--temperature", "3", "--top-p", "0.95", "--seed")
    assert talk(*warm, "1") == talk(*warm, "1") != talk(*warm, "2")
    assert talk() == talk() != talk(*warm, "1")
    assert talk("--system", "no red circle") != talk()


def test_quit_ends_before_the_input(piped):
    assert piped("/quit", "which?") == (0, "", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens (0) must be at least 1"),
        (("--temperature", "-1"), "temperature (-1.0) must be from 1e-6 to 1e6"),
        (("--top-p", "0.5"), "top_p (0.5) requires a temperature"),
    ],
)
def test_options_out_of_range_are_named_before_the_model_is_loaded(run, tmp_path, options, message):
    code, shown, error = run("chat", "--model", tmp_path / "none", *options)
    assert (code, shown) == (1, "")
    assert error.startswith(f"unimoe chat: {message}")


def test_several_processes_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE (2) must be 1" in run("chat", "--model", tmp_path)[2]


def test_an_interrupted_pipe_ends(folder, piped, monkeypatch):
    def interrupted(self, *arguments, **media):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "reply", interrupted)
    with pytest.raises(SystemExit) as stopped:
        piped("what?", "which?")
    assert stopped.value.code == 130
