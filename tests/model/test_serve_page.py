"""The page's requests, as a browser sends them: replies, files, and what Gradio must not do."""

import json
import os
import socket
import threading
import uuid

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("av", reason="av is not installed: pip install .[media]")
from conversing import PATIENCE, Seen, anew, wait
from gradio import analytics
from serving import Live, save_talker
from test_serve_decoding import huge_png, png

from unimoe_model.serve.limits import Limits
from unimoe_model.serve.uploads import Uploads


class Browser:
    """An open page."""

    def __init__(self, live):
        self.client, self.session = live.client, uuid.uuid4().hex
        self.config = self.client.get("/config").json()

    def upload(self, content, name="a.png"):
        return self.client.post("/gradio_api/upload", files={"files": (name, content)})

    def event(self, element, output="click"):
        """Number of the function that an element calls."""
        (wanted,) = [
            component["id"]
            for component in self.config["components"]
            if component["props"].get("elem_id") == element
        ]
        (found,) = [
            event for event in self.config["dependencies"] if [wanted, output] in event["targets"]
        ]
        return found["id"]

    def call(self, element, *data, on_message=lambda message: None):
        """Runs a function; gives its last message."""
        joined = self.client.post(
            "/gradio_api/queue/join",
            json={"data": data, "fn_index": self.event(element), "session_hash": self.session},
        )
        assert joined.status_code == 200, joined.text
        url = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.client.stream("GET", url) as response:
            for line in response.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                on_message(message)
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("the stream ended")

    def send(self, text, image=None, **options):
        """Sends a message; gives all that was shown meanwhile, as one text."""
        shown = []

        def note(message):
            shown.append(json.dumps(message.get("output", ""), ensure_ascii=False))

        file = None if image is None else {"path": image, "meta": {"_type": "gradio.FileData"}}
        ended = self.call("um-send", text, file, None, None, None, on_message=note, **options)
        return "".join(shown).replace('\\"', '"'), ended


@pytest.fixture
def live(tiny_model, tokenizer, tmp_path, encoders, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    started = []

    def start(limits=None, context=4096, **options):
        folder = save_talker(tiny_model, tokenizer, tmp_path, context)
        started.append(Live(folder, limits, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def folder_of(live):
    return os.environ["GRADIO_TEMP_DIR"]


def files_in(folder):
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def test_a_message_with_a_picture_and_one_after_it(live):
    server = live()
    browser, model = Browser(server), server.answerer.model
    (path,) = browser.upload(png()).json()
    assert files_in(folder_of(server)) == [path]
    shown, ended = browser.send("what is it?", path)
    assert ended["success"]
    turns = [("<image>\nwhat is it?", None)]
    first, _ = anew(model, server.answerer.processor, turns, {"image": [png()]}, 6)
    assert f'<div class="um-text">{first}</div>' in shown
    assert "20 x 30 pixels" in shown
    assert "3 soft tokens" in shown
    assert shown.count('<table class="um-layer">') == 2
    assert files_in(folder_of(server)) == []
    turns = [(turns[0][0], first), ("and now?", None)]
    second, _ = anew(model, server.answerer.processor, turns, {"image": [png()]}, 6)
    shown, _ = browser.send("and now?")
    assert f'<div class="um-text">{second}</div>' in shown
    alone = Browser(server).send("and now?")[0]
    assert "20 x 30 pixels" not in alone


def test_files_that_are_refused_are_deleted_and_named(live):
    server = live(context=64)
    browser = Browser(server)
    for content, name, message in (
        (b"hello", "a.png", "image must be a picture such as PNG or JPEG"),
        (huge_png(), "b.png", "image (100,000 x 100,000 pixels) must have"),
    ):
        (path,) = browser.upload(content, name).json()
        shown, ended = browser.send("what is it?", path)
        assert ended["success"]
        assert message in shown
        assert "what is it?" in shown
        assert files_in(folder_of(server)) == []
    shown, _ = browser.send("what? " * 60)
    assert "must be shorter than the model&#x27;s context (64)" in shown
    assert '<div class="um-text">' in browser.send("what?")[0]


def test_words_are_text_and_nothing_else(live):
    shown, _ = Browser(live()).send("<img src=x onerror=alert(1)>")
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert "<img src=x" not in shown


def test_files_elsewhere_are_neither_read_nor_deleted(live, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    browser = Browser(live())
    browser.send("what?")  # Gradio makes its inputs anew with it
    shown, ended = browser.send("what?", str(secret))
    assert not ended["success"]
    assert "pixels" not in shown
    assert secret.exists()


def test_addresses_are_not_fetched(live):
    browser = Browser(live())
    browser.send("what?")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        _, ended = browser.send("what?", url)
        assert not ended["success"]
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_uploads_are_bounded(live):
    server = live(Limits(body_bytes=100_000, uploads_bytes=250_000))
    browser = Browser(server)
    assert browser.upload(bytes(100_001)).status_code == 413
    assert files_in(folder_of(server)) == []
    assert browser.upload(bytes(90_000)).status_code == 200
    assert browser.upload(bytes(91_000)).status_code == 200
    refused = browser.upload(bytes(92_000))
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "60")
    assert len(files_in(folder_of(server))) == 2


def test_files_that_are_never_sent_are_deleted(tmp_path):
    uploads = Uploads()
    old, new = (uploads.place() / "a.png" for _ in range(2))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    uploads.expire(600)
    assert [old.exists(), old.parent.exists(), new.exists()] == [False, False, True]
    with pytest.raises(ValueError, match="must be uploaded first"):
        uploads.own(str(uploads.folder / ".." / "a.png"))
    uploads.close()
    assert not uploads.folder.exists()


def test_nothing_stays_after_the_server(live):
    server = live()
    folder = folder_of(server)
    Browser(server).upload(png())
    server.close()
    assert not os.path.exists(folder)


def test_a_stopped_reply_stays_in_the_conversation(live):
    server = live(max_new_tokens=3000)
    browser, stopping, reached = Browser(server), Browser(server), threading.Event()
    stopping.session = browser.session

    def on_forward(count):
        if count == 4:
            reached.set()
            wait(stopped)

    stopped, seen = threading.Event(), Seen(server.answerer.model, on_forward)

    def stop():
        wait(reached)
        server.client.post(
            "/gradio_api/queue/join",
            json={
                "data": [],
                "fn_index": browser.event("um-stop"),
                "session_hash": browser.session,
            },
        )

    thread = threading.Thread(target=stop)
    thread.start()

    def note(message):
        # The stop button's own event ends while the reply is held.
        if message.get("msg") == "process_completed" and reached.is_set():
            stopped.set()

    join = browser.call
    shown = []

    def all_shown(message):
        shown.append(json.dumps(message))
        note(message)

    join("um-send", "what?", None, None, None, None, on_message=all_shown)
    thread.join(PATIENCE)
    stopped.set()
    seen.remove()
    assert server.ask("which?", max_tokens=1).status_code == 200
    assert len(seen.lengths) < 1000


def test_the_example_files_are_used_like_uploaded_ones(live):
    server = live()
    browser = Browser(server)
    ended = browser.call("um-try-image")
    question, image = ended["output"]["data"][:2]
    assert question == "what shape is it?"
    assert files_in(folder_of(server)) == [image["path"]]
    shown, _ = browser.send(question, image["path"])
    assert "192 x 192 pixels" in shown
    assert files_in(folder_of(server)) == []


def test_gradio_talks_to_nobody(live):
    server = live()
    assert not analytics.analytics_enabled()
    config = server.client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    info = server.client.get("/gradio_api/info")
    assert info.status_code != 200 or not info.json().get("named_endpoints")
    page = server.client.get("/").text
    for host in ("googleapis", "gstatic", "huggingface.co/", "cdnjs", "jsdelivr"):
        assert host not in page.split("window.gradio_config")[0], host


def test_the_page_needs_the_token_too(live):
    server = live(token="s3cret")
    assert server.client.get("/").status_code == 401
    assert server.client.get("/config").status_code == 401
    entered = server.client.get("/?token=s3cret")
    assert entered.status_code == 303
    assert server.client.get("/").status_code == 200
    assert server.ask("what?").status_code == 200
