"""Every bad input at a server in a process of its own: one clear message each, and it stays up."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("httpx", reason="httpx is not installed: pip install .[serve]")
pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("av", reason="av is not installed: pip install .[media]")
import httpx
from conversing import PATIENCE
from serving import Process, picture, request, save_talker, spoken
from test_serve_decoding import huge_png, png, wav

MIB = 2**20


@pytest.fixture
def process(tiny_model, tokenizer, tmp_path):
    started = []

    def start(*options):
        save_talker(tiny_model, tokenizer, tmp_path, context=64)
        started.append(Process(tmp_path, "--max-new-tokens", "4", *options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def send_gigabytes(port, size, chunked):
    """Streams a body that is never held; gives status and message."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    block = b"x" * MIB
    connection.putrequest("POST", "/v1/chat/completions")
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(size))
    connection.endheaders()
    for _ in range(size // MIB):
        connection.send(b"%x\r\n%s\r\n" % (MIB, block) if chunked else block)
    if chunked:
        connection.send(b"0\r\n\r\n")
    response = connection.getresponse()
    found = response.status, json.loads(response.read())["error"]["message"]
    connection.close()
    return found


def two_hundred_at_once(server):
    """Status and headers of each of 200 requests that are sent together."""
    together = threading.Barrier(200)
    body = json.dumps(request([picture(png()), {"type": "text", "text": "what?"}]))

    def ask(_):
        with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
            together.wait(PATIENCE)
            response = client.post("/v1/chat/completions", content=body)
            return response.status_code, response.headers, response.json()

    with ThreadPoolExecutor(200) as threads:
        return list(threads.map(ask, range(200)))


@pytest.mark.slow
def test_bad_inputs_get_one_message_each_and_the_server_stays_up(process):
    server = process("--queue", "8")
    ask = server.client.post
    # Encoders, decoder and generation are there before memory is measured.
    warm = [picture(png((800, 600))), spoken(wav(16))]
    assert ask("/v1/chat/completions", json=request(warm)).status_code == 200
    before = server.memory()

    def refused(content, status=400):
        response = ask("/v1/chat/completions", json=request(content))
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        assert server.is_up()
        return response.json()["error"]["message"]

    no_picture = "image must be a picture such as PNG or JPEG; this file is none"
    assert refused([picture(b"no picture at all")]) == no_picture
    assert refused([picture(huge_png())]).startswith(
        "image (100,000 x 100,000 pixels) must have at most 64,000,000 pixels"
    )
    hours = wav(claimed=5 * 3600 * 32000)
    assert refused([spoken(hours)]) == "speech (18,000 s) must last at most 300 s"
    beyond = "must be shorter than the model's context (64)"
    assert beyond in refused("what? " * 100)
    response = ask("/v1/chat/completions", content=b'{"model": "model", "messages": [')
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("body must be JSON")
    assert server.is_up()

    too_large = (413, "body must have at most 33,554,432 bytes")
    assert send_gigabytes(server.port, 2 * 2**30, chunked=False) == too_large
    assert send_gigabytes(server.port, 128 * MIB, chunked=True) == too_large
    assert server.is_up()

    responses = two_hundred_at_once(server)
    assert len(responses) == 200
    served = [found for status, _, found in responses if status == 200]
    turned_away = [(headers, found) for status, headers, found in responses if status == 503]
    assert len(served) + len(turned_away) == 200
    assert len(served) >= 8
    assert len({found["choices"][0]["message"]["content"] for found in served}) == 1
    for headers, found in turned_away:
        assert int(headers["Retry-After"]) >= 1
        assert found["error"]["message"].startswith("the queue (8 requests) is full")
    assert server.client.get("/health").json() == {"status": "ok", "queue": 0, "model": "model"}
    assert server.memory() - before < 150 * MIB
    assert ask("/v1/chat/completions", json=request(warm)).status_code == 200
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = run("serve", "--model", tmp_path / "none", "--port", port)
    assert code == 1
    assert error == (
        f"unimoe serve: host and port (127.0.0.1:{port}) must be free: Address already in use"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "must be a folder with a config.json"),
        (("--port", "70000"), "port (70000) must be from 0 to 65535"),
        (("--port", "-1"), "port (-1) must be at least 0"),
        (("--queue", "0"), "queue (0) must be at least 1"),
        (("--max-new-tokens", "0"), "max_new_tokens (0) must be at least 1"),
        (("--reply-seconds", "0"), "reply_seconds (0.0) must be positive"),
        (("--temperature", "-1"), "temperature (-1.0) must be from 1e-6 to 1e6"),
        (("--host", "203.0.113.9"), "host and port (203.0.113.9:0) must be free"),
    ],
)
def test_a_folder_that_is_no_model_and_options_out_of_range(run, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    code, shown, error = run("serve", "--model", tmp_path / "empty", "--port", "0", *options)
    assert (code, shown) == (1, "")
    assert message in error


def test_broken_models_are_named(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    error = run("serve", "--model", tmp_path, "--port", "0")[2]
    assert "model_type ('llama')" in error
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "is no JSON object" in run("serve", "--model", tmp_path, "--port", "0")[2]
