"""Prompts that the language model answers once."""

import json

import pytest
import torch
from demo_assets import needs
from test_smol_debian import Reporter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.smol.language_model import CHAT_TEMPLATE, answers
from examples.smol.sources import conversations
from examples.smol.sources.conversations import answered, prompts, whole_sentences


@pytest.fixture
def folder(tmp_path):
    words = ["[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant", *"abcdefgh", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    fast.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_answers_of_a_batch_are_those_of_each_prompt(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = ["a b c d", "e", "f g h a b c"]
    together = answers(model, tokenizer, asked, 6)
    alone = [answers(model, tokenizer, [prompt], 6)[0] for prompt in asked]
    assert together == alone
    assert len({text for text, _ in together}) > 1


def test_samples_are_those_of_their_seed(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = torch.get_rng_state()
    asked = ["a b c d"] * 8
    first, again, other = (answers(model, tokenizer, asked, 6, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({text for text, _ in first}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_are_generated_once(folder, tmp_path, monkeypatch):
    said = []

    def say(model, tokenizer, batch, most, seed):
        said.extend(batch)
        return [(f"{prompt} it is. And", False) for prompt in batch]

    monkeypatch.setattr(conversations, "answers", say)
    cache = tmp_path / "data/answers.json"
    asked = ["long one", "short"]
    found = answered(asked, folder, cache, Reporter())
    assert found == {"long one": "long one it is.", "short": "short it is."}
    assert list(found) == ["long one", "short"]
    assert json.loads(cache.read_text()) == found
    more = [*asked, "new"]
    reporter = Reporter()
    assert answered(more, folder, cache, reporter)["new"] == "new it is."
    assert said.count("short") == 1
    assert (reporter.total, reporter.done) == (3, 2)
    assert answered(more, tmp_path / "nothing", cache, Reporter()) == {
        "long one": "long one it is.", "short": "short it is.", "new": "new it is."
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("Yes. No", True, "Yes. No"),
        ("Yes. No", False, "Yes."),
        ("It is 3.5 m. It", False, "It is 3.5 m."),
        ("One\ntwo! three", False, "One\ntwo!"),
        ("never ends", False, ""),
    ],
)
def test_an_answer_is_cut_off_after_a_whole_sentence(text, ended, kept):
    assert whole_sentences(text, ended) == kept


@needs("chatterbot_corpus")
def test_prompts_are_different_and_short():
    found = prompts()
    assert len(found) > 500
    assert len({prompt.text.lower() for prompt in found}) == len(found)
    assert len({prompt.name for prompt in found}) == len(found)
    assert max(len(prompt.text.split()) for prompt in found) <= 20
    assert not any(prompt.name.startswith(conversations.LEFT_OUT) for prompt in found)
