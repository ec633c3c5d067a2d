"""The page in a real browser: Debian's chromium, through Playwright."""

import io
import re
import shutil
import wave

import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("av", reason="av is not installed: pip install .[media]")
pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
from conversing import PATIENCE, anew
from PIL import Image
from playwright import sync_api as playwright
from serving import Live, save_talker

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt install chromium"),
]


@pytest.fixture
def live(tiny_model, tokenizer, tmp_path, encoders, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    started = []

    def start(**options):
        started.append(Live(save_talker(tiny_model, tokenizer, tmp_path), **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(params=[1280, 420])
def open_page(request):
    """Opens the page of a server at a width; no request may leave for another host."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        elsewhere, errors = [], []

        def show(live):
            page = browser.new_page(viewport={"width": request.param, "height": 860})
            page.set_default_timeout(1000 * PATIENCE)

            def note(asked):
                if not asked.url.startswith((live.address, "data:", "blob:")):
                    elsewhere.append(asked.url)

            page.on("request", note)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(live.address)
            page.wait_for_selector("#um-send")
            return page

        yield show
        browser.close()
        assert elsewhere == []
        assert errors == []


def image_file(name="red.png", color="red"):
    content = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(content, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": content.getvalue()}


def sound_file():
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((3000 * np.sin(np.arange(100))).astype("<i2").tobytes())
    return {"name": "asked.wav", "mimeType": "audio/wav", "buffer": content.getvalue()}


def attach(page, kind, file):
    with page.expect_response(re.compile("/upload")):
        page.set_input_files(f"#um-{kind} input[type=file]", file)
    page.wait_for_selector(f"#um-{kind} :is(img, [aria-label='Clear'], audio, .waveform-container)")


def send(page, text, replies):
    """Sends a message; gives the text of the reply that is the so many-th."""
    page.fill("#um-text textarea", text)
    page.click("#um-send")
    page.wait_for_function(
        "n => document.querySelectorAll('.um-model').length === n"
        " && !document.querySelector('#um-live .um-turn')",
        arg=replies,
    )
    return page.locator(".um-model .um-text").nth(replies - 1).inner_text()


def test_a_picture_a_wrong_file_and_a_second_turn(live, open_page):
    server = live(max_new_tokens=8)
    model, processor = server.answerer.model, server.answerer.processor
    page = open_page(server)
    picture = image_file()
    media = {"image": [picture["buffer"]]}
    attach(page, "image", picture)
    first = send(page, "what is it?", 1)
    turns = [("<image>\nwhat is it?", None)]
    assert first == anew(model, processor, turns, media, 8)[0]
    card = page.locator(".um-card")
    assert card.inner_text().split("\n") == ["image 20 x 30 pixels", "3 soft tokens"]
    assert card.locator("img").evaluate("image => image.naturalWidth") == 20
    layers = page.locator(".um-layer")
    assert layers.count() == 2
    assert layers.nth(0).locator("tbody tr").count() == 3  # text, image, reply
    for row in layers.nth(1).locator("tbody tr").all():
        assert abs(sum(map(int, row.locator("td").all_inner_texts())) - 100) <= 2

    wrong = image_file("wrong.png") | {"buffer": b"this is no picture"}
    page.set_input_files("#um-image input[type=file]", wrong)
    page.wait_for_selector("#um-image img", state="attached")
    page.fill("#um-text textarea", "and this?")
    page.click("#um-send")
    page.wait_for_selector(".um-error")
    assert page.locator(".um-error").inner_text() == (
        "image must be a picture such as PNG or JPEG; this file is none"
    )
    assert page.input_value("#um-text textarea") == "and this?"
    reply, error = (page.locator(found).bounding_box() for found in (".um-model", ".um-error"))
    assert reply["y"] + reply["height"] <= error["y"], "what comes later is shown below"
    box = page.locator("#um-transcript").bounding_box()
    assert error["y"] + error["height"] <= box["y"] + box["height"], "the end is in view"

    second = send(page, "yes or no?", 2)
    turns = [(turns[0][0], first), ("yes or no?", None)]
    assert second == anew(model, processor, turns, media, 8)[0]
    assert page.locator(".um-error").count() == 0
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0, "the page is wider than the window"

    page.click("#um-new")
    page.wait_for_selector(".um-empty")
    again = send(page, "yes or no?", 1)
    assert again == anew(model, processor, [("yes or no?", None)], {}, 8)[0]


def test_speech_that_asks_by_itself(live, open_page):
    server = live(max_new_tokens=8)
    page = open_page(server)
    page.get_by_role("tab", name="Speech").click()
    page.locator("#um-speech").get_by_label("Upload file").click()
    sound = sound_file()
    attach(page, "speech", sound)
    reply = send(page, "", 1)
    media = {"speech": [sound["buffer"]]}
    model, processor = server.answerer.model, server.answerer.processor
    assert reply == anew(model, processor, [("<speech>", None)], media, 8)[0]
    assert "8 soft tokens" in page.locator(".um-card").inner_text()


def test_stop(live, open_page):
    """The reply would take 3500 tokens."""
    server = live(max_new_tokens=3500)
    page = open_page(server)
    page.fill("#um-text textarea", "what?")
    page.press("#um-text textarea", "Enter")
    page.wait_for_selector("#um-live .um-caret")
    page.wait_for_function(
        "document.querySelector('#um-live .um-model .um-text')?.innerText.length > 20"
    )
    page.click("#um-stop")
    page.wait_for_selector(".um-note")
    assert page.locator(".um-note").inner_text() == "stopped"
    stopped = page.locator(".um-model .um-text").inner_text()
    assert 0 < len(stopped.split()) < 3500
    assert page.locator("#um-stop").is_disabled()
    page.fill("#um-text textarea", "which?")
    page.click("#um-send")
    page.wait_for_selector("#um-live .um-caret")
    page.click("#um-stop")
    page.wait_for_function("document.querySelectorAll('.um-note').length === 2")


def test_a_page_that_is_closed_stops_its_reply(live, open_page):
    server = live(max_new_tokens=3500)
    page = open_page(server)
    page.fill("#um-text textarea", "what?")
    page.click("#um-send")
    page.wait_for_selector("#um-live .um-caret")
    page.close()
    response = server.ask("which?", max_tokens=1)
    assert response.status_code == 200
    text = server.client.get("/metrics").text
    generated = int(re.search(r'unimoe_tokens_total\{of="generated"\} (\d+)', text)[1])
    assert generated < 3500


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_the_examples(live, open_page, kind):
    page = open_page(live(max_new_tokens=4))
    page.click(f"#um-try-{kind}")
    page.wait_for_function("document.querySelector('#um-text textarea').value")
    page.click("#um-send")
    page.wait_for_selector(".um-layer")
    assert "soft tokens" in page.locator(".um-card").inner_text()
    assert page.locator(".um-error").count() == 0
