"""The client library of the OpenAI format talks to a server."""

import base64
import wave

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("openai", reason="openai is not installed: pip install openai")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
import numpy as np
import openai
from conversing import anew
from PIL import Image
from serving import Live, data_uri, save_talker


@pytest.fixture
def server(tiny_model, tokenizer, tmp_path, encoders):
    live = Live(save_talker(tiny_model, tokenizer, tmp_path))
    yield live
    live.close()


def png(path):
    Image.new("RGB", (20, 30), "red").save(path)
    return path


def wav(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((3000 * np.sin(np.arange(100))).astype("<i2").tobytes())
    return path


def streamed(server, content):
    """The text of a reply, and how many pieces it came in."""
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused")
    messages = [{"role": "user", "content": content}]
    stream = client.chat.completions.create(model="model", messages=messages, stream=True)
    pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    return "".join(pieces), len([piece for piece in pieces if piece])


def test_a_picture_question_and_a_spoken_one_are_streamed(server, tmp_path):
    model, processor = server.answerer.model, server.answerer.processor
    picture, recording = png(tmp_path / "red.png"), wav(tmp_path / "asked.wav")
    part = {"type": "image_url", "image_url": {"url": data_uri(picture.read_bytes())}}
    text, pieces = streamed(server, [part, {"type": "text", "text": "what is it?"}])
    media = {"image": [picture]}
    assert text == anew(model, processor, [("<image>\nwhat is it?", None)], media, 6)[0]
    assert pieces > 1
    data = base64.b64encode(recording.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    text, pieces = streamed(server, [part])
    media = {"speech": [recording]}
    assert text == anew(model, processor, [("<speech>", None)], media, 6)[0]
    assert pieces > 1
