"""The OpenAI chat format over HTTP, of a tiny model: replies, order, errors and ends."""

import io
import json
import socket
import threading
import wave
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from conversing import PATIENCE, Seen, anew, wait
from PIL import Image
from serving import Live, chunks_of, picture, request, save_talker, spoken, text_of

from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.serve.limits import Limits


def png(color="red"):
    content = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(content, "PNG")
    return content.getvalue()


def wav():
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((3000 * np.sin(np.arange(100))).astype("<i2").tobytes())
    return content.getvalue()


@pytest.fixture
def live(tiny_model, tokenizer, tmp_path, encoders):
    started = []

    def start(limits=None, context=4096, **options):
        folder = save_talker(tiny_model, tokenizer, tmp_path, context)
        started.append(Live(folder, limits, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(live):
    return live()


class Held:
    """Holds the model of a server at a forward, until it is let go."""

    def __init__(self, server, at=1):
        self.reached, self.go = threading.Event(), threading.Event()

        def on_forward(count):
            if count == at:
                self.reached.set()
                wait(self.go)

        self.seen = Seen(server.answerer.model, on_forward)


def error_of(response):
    return response.json()["error"]


@contextmanager
def sent(server, asked):
    """Sends a request, and goes away without a response."""
    body = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        yield


def expected(server, *turns, system=None, max_new_tokens=6, **media):
    model, processor = server.answerer.model, server.answerer.processor
    return anew(model, processor, turns, media, max_new_tokens, system)


def test_a_question_about_a_picture(server):
    text, prompt = expected(server, ("<image>\nwhat is it?", None), image=[png()])
    response = server.ask([{"type": "text", "text": "what is it?"}, picture(png())])
    assert response.status_code == 200
    found = response.json()
    assert found["choices"][0]["message"]["content"] == text != ""
    assert found["choices"][0]["finish_reason"] == "length"
    usage = {"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}
    assert found["usage"] == usage
    assert found["unimoe"]["media"] == ["image: 20 x 30 pixels, 3 soft tokens"]
    other = server.ask([{"type": "text", "text": "what is it?"}, picture(png("blue"))]).json()
    assert other["choices"][0]["message"]["content"] != text


def test_routing_is_that_of_the_prompt(server):
    found = server.ask([picture(png())]).json()["unimoe"]["routing"]
    counts = RoutingCounts(server.answerer.model)
    counts.add(server.answerer.processor.ask(images=[png()]))
    assert found["layers"] == counts.layers
    assert found["tokens"]["reply"] == 5  # the last token is never given to the LLM
    for modality, shares in counts.shares().items():
        assert found["tokens"][modality] == counts.tokens[modality]
        taken = np.array(found["taken"][modality])
        assert (taken.sum(1) == 2 * counts.tokens[modality]).all()
        np.testing.assert_allclose(taken / taken.sum(1, keepdims=True), shares.numpy())
    assert (np.array(found["taken"]["reply"]).sum(1) == 10).all()


def test_streams_have_the_same_words(server):
    content = [spoken(wav())]
    whole = server.ask(content).json()["choices"][0]["message"]["content"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream(
        "POST", "/v1/chat/completions", json=request(content, **options)
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = chunks_of(response)
    assert text_of(chunks) == whole == expected(server, ("<speech>", None), speech=[wav()])[0]
    assert len([chunk for chunk in chunks if chunk["choices"]]) >= 4
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-2]["unimoe"]["media"] == ["speech: 0.0 s, 8 soft tokens"]
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_turns_before_and_options(server):
    messages = [
        {"role": "system", "content": "no yes"},
        {"role": "user", "content": [{"type": "text", "text": "what?"}, picture(png())]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [spoken(wav(), kind="audio")]},
    ]
    found = server.ask(messages, max_tokens=3).json()
    turns = [("<image>\nwhat?", "a red circle"), ("<audio>", None)]
    media = {"image": [png()], "audio": [wav()]}
    text, prompt = expected(server, *turns, system="no yes", max_new_tokens=3, **media)
    assert found["choices"][0]["message"]["content"] == text
    assert found["usage"]["prompt_tokens"] == prompt
    assert prompt != expected(server, *turns, max_new_tokens=3, **media)[1]

    def drawn(seed):
        asked = server.ask("what?", temperature=3.0, seed=seed).json()
        return asked["choices"][0]["message"]["content"]

    assert drawn(1) == drawn(1) != drawn(2)


def test_errors_have_a_status_and_one_message(live):
    server = live(context=40)
    cases = [
        ("what? " * 60, {}, 400, "must be shorter than the model's context (40)"),
        ([picture(b"hello")], {}, 400, "image must be a picture such as PNG or JPEG"),
        ([picture(b"hello")], {"stream": True}, 400, "image must be a picture"),
        ("what?", {"model": "gpt"}, 404, "model (gpt) must be model"),
        ("", {}, 400, "question is empty"),
        ("<image> what?", {}, 400, "1 <image> but 0 image items"),
        ("what?", {"n": 3}, 400, "n (3) is not served"),
    ]
    for content, fields, status, message in cases:
        response = server.ask(content, **fields)
        assert response.status_code == status, response.text
        assert message in error_of(response)["message"]
    assert error_of(server.ask("what? " * 60))["code"] == "context_length_exceeded"
    response = server.client.post("/v1/chat/completions", content=b"{")
    assert (response.status_code, error_of(response)["message"][:17]) == (400, "body must be JSON")
    assert server.ask("what?").status_code == 200


def test_models_health_and_metrics(server):
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["model"]
    server.ask("what?")
    server.ask([picture(b"hello")])
    health = server.client.get("/health").json()
    assert health == {"status": "ok", "queue": 0, "model": "model"}
    text = server.client.get("/metrics").text
    assert 'unimoe_requests_total{ending="length"} 1' in text
    assert 'unimoe_requests_total{ending="refused"} 1' in text
    assert 'unimoe_tokens_total{of="generated"} 6' in text
    assert "unimoe_time_to_first_token_seconds_count 1" in text


def test_requests_wait_for_their_turn_and_are_refused_beyond_the_queue(live):
    server = live(Limits(queue=2))
    held, first = Held(server), []
    thread = threading.Thread(target=lambda: first.append(server.ask("what?")))
    thread.start()
    wait(held.reached)
    with server.client.stream(
        "POST", "/v1/chat/completions", json=request("which?", stream=True)
    ) as second:
        lines = second.iter_lines()
        assert next(lines).startswith(": 1 before this one, about ")
        refused = server.ask("what?")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "the queue (2 requests) is full" in error_of(refused)["message"]
        assert server.client.get("/health").json()["queue"] == 2
        held.go.set()
        text = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in lines
            if line.startswith("data: {")
        )
    thread.join(PATIENCE)
    held.seen.remove()
    assert (
        first[0].json()["choices"][0]["message"]["content"] == expected(server, ("what?", None))[0]
    )
    assert text == expected(server, ("which?", None))[0]
    assert server.ask("what?").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_reply(live, stream):
    server = live(max_new_tokens=3000)
    held = Held(server, at=3)
    with sent(server, request("what?", stream=stream)):
        wait(held.reached)
    held.go.set()
    assert server.ask("which?", max_tokens=2).status_code == 200  # comes after the one before
    held.seen.remove()
    assert len(held.seen.lengths) < 1000
    assert 'ending="gone"} 1' in server.client.get("/metrics").text


def test_one_that_goes_away_leaves_the_queue(live):
    server = live(Limits(queue=2))
    held = Held(server)
    thread = threading.Thread(target=lambda: server.ask("what?"))
    thread.start()
    wait(held.reached)
    with sent(server, request("which?")):
        while server.client.get("/health").json()["queue"] < 2:
            pass
    while server.client.get("/health").json()["queue"] > 1:
        pass
    held.go.set()
    thread.join(PATIENCE)
    held.seen.remove()
    assert len(held.seen.lengths) == 6


def test_a_reply_that_takes_too_long_is_cut_off(live):
    server = live(Limits(reply_seconds=0.2), max_new_tokens=4000)
    found = server.ask("what?").json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["unimoe"]["ending"] == "time"
    assert 0 < found["usage"]["completion_tokens"] < 4000


def test_a_dense_model_has_no_map(live, tiny_model, tokenizer, tmp_path, encoders):
    from unimoe_model.processing import UniMoEProcessor

    folder = tmp_path / "dense"
    model = tiny_model(num_experts=0)
    model.save_pretrained(folder)
    UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folder)
    server = Live(folder)
    try:
        response = server.ask("what?", model="dense")
        assert response.json()["unimoe"]["routing"] is None
        assert "dense" in server.client.get("/").text
    finally:
        server.close()
