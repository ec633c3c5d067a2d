"""A server of every kind of model folder replies as `Answerer` does."""

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from contextlib import closing

import torch
from llms import CHATML, INST, THINKING, chat_tokenizer, llm_fields
from serving import Live, Process, picture, request, spoken
from test_serve_decoding import png, wav

from unimoe_kernels import QuantizedExperts
from unimoe_model.generation import Answerer
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS

TOKENS = 8
"""More than the few tokens after which replies of different models may still be equal."""


def check_replies(server, answerer, name):
    """Compares replies to a picture, to speech and to text with those of the answerer."""
    cases = (
        ([{"type": "text", "text": "what is it?"}, picture(png())], "what is it?", "images", png()),
        ([spoken(wav())], "", "speech", wav()),
        ("how high?", "how high?", None, None),
    )
    found = []
    for content, question, kind, item in cases:
        fields = request(content, model=name, max_tokens=TOKENS, stream=False)
        response = server.client.post("/v1/chat/completions", json=fields)
        assert response.status_code == 200, response.text
        found.append(response.json()["choices"][0]["message"]["content"])
        media = {kind: [item]} if kind else {}
        assert found[-1] == answerer.answer(question, TOKENS, **media)
    assert all(found)
    return found


def is_quantized(answerer):
    return any(isinstance(part, QuantizedExperts) for part in answerer.model.modules())


def save(model, processor, folder):
    """Saves a model that generates ASCII alone: no reply is cut off within a character."""
    words = map(processor.tokenizer.decode, range(model.config.text_config.vocab_size))
    model.generation_config.suppress_tokens = [
        number
        for number, word in enumerate(words)
        if not word.strip().isalpha() or not word.isascii()
    ]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def wide(tiny_model, tokenizer, tmp_path, encoders):
    """A folder whose widths int4 takes."""
    model = tiny_model(text_config={"hidden_size": 64, "intermediate_size": 64})
    return save(model, UniMoEProcessor.from_config(model.config, tokenizer), tmp_path / "model")


@pytest.mark.parametrize("format", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_folder_that_was_quantised(wide, run, tmp_path, format):
    folder = tmp_path / format
    assert run("quantize", "--model", wide, "--to", folder, "--format", format)[0] == 0
    with closing(Live(folder, max_new_tokens=TOKENS)) as server:
        assert is_quantized(server.answerer)
        of_quantized = check_replies(server, Answerer.from_pretrained(folder), folder.name)
        assert server.ask("what?", model=format).json()["unimoe"]["routing"]["layers"] == [0, 1]
    if format == "int4":
        with closing(Live(wide, max_new_tokens=TOKENS)) as server:
            assert check_replies(server, Answerer.from_pretrained(wide), "model") != of_quantized


@pytest.mark.slow
def test_one_that_is_quantised_as_it_is_loaded(wide, tmp_path):
    (tmp_path / "encoders.yaml").write_text(
        "vision: fakes:FakeVision\nspeech: fakes:FakeSpeech\naudio: fakes:FakeAudio\n"
    )
    with closing(Process(tmp_path, "--quantize", "int4")) as server:
        expected = Answerer.from_pretrained(wide, quantize="int4")
        assert check_replies(server, expected, "model")


@pytest.mark.parametrize(
    ("family", "template", "options"),
    [
        ("llama", CHATML, {}),  # SmolLM2, as `make smol` builds on
        pytest.param("qwen3", THINKING, {}, marks=pytest.mark.slow),
        pytest.param("mistral", INST, {"bos_token": "<s>"}, marks=pytest.mark.slow),
    ],
)
def test_llms_with_a_chat_template(tiny_config, encoders, tmp_path, family, template, options):
    tokenizer = chat_tokenizer(template, **options)
    tokenizer.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
    tokenizer.pad_token = tokenizer.eos_token
    kinds = {kind: tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in PLACEHOLDERS}
    sizes = llm_fields(family, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(11)
    model = UniMoEForConditionalGeneration(
        tiny_config(text_config=sizes, media_token_ids=kinds)
    ).eval()
    processor = UniMoEProcessor.from_config(model.config, tokenizer, prompt_format="chat")
    folder = save(model, processor, tmp_path / family)
    with closing(Live(folder, max_new_tokens=TOKENS)) as server:
        check_replies(server, Answerer.from_pretrained(folder), family)
