"""Prompts, labels and truncation of the published code; see `test_golden.py`."""

import json

import pytest
from published import (
    Case,
)
from published_prompts import PUBLISHED_IDS, prompts_of, spoken, turns_of
from transformers import LlamaTokenizer

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import VICUNA_SYSTEM, conversation_text
from unimoe_model.tokenization import (
    IGNORED,
    load_llama_tokenizer,
    tokenize_conversation,
    tokenize_text,
    truncated,
)


@pytest.fixture(params=["legacy_false", "legacy_true"])
def published_text(request):
    """What the published code says of texts, our tokenizer, and the ids of placeholders."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("prompt_labels")
    tokenizer = LlamaTokenizer.from_pretrained(case.folder, legacy=request.param == "legacy_true")
    return case, prompts_of(case)[request.param], tokenizer


def test_prompts_and_labels(published_text):
    case, texts, tokenizer = published_text
    given_up = set(case.checks["mismatch_warnings"])
    for name, sample in texts["training"].items():
        turns = turns_of(sample["conversation"])
        assert conversation_text(turns, VICUNA_SYSTEM)[0] == sample["prompt"], name
        own = tokenize_conversation(turns, tokenizer, PUBLISHED_IDS, VICUNA_SYSTEM)
        assert own.ids == sample["input_ids"], name
        if name in given_up:
            # The published code loses count here and learns nothing of the sample.
            assert set(sample["labels"]) == {IGNORED}, name
            supervised = [label for label in own.labels if label != IGNORED]
            said = tokenizer.decode(supervised, skip_special_tokens=False)
            assert said.replace(" ", "") == spoken(answer for _, answer in turns), name
        else:
            # A placeholder in an answer stays a label there, and fails in the loss.
            expected = [label if label >= 0 else IGNORED for label in sample["labels"]]
            assert own.labels == expected, name
        dropped = sample.get("speech_package_preprocess")
        if dropped:
            # One of the published packages reads a video's placeholder as text.
            assert PUBLISHED_IDS["video"] not in dropped["input_ids"]
            assert PUBLISHED_IDS["video"] in own.ids
    assert given_up < set(texts["training"])


def test_prompts_of_inference(published_text):
    _, texts, tokenizer = published_text
    for name, sample in texts["inference"].items():
        prompt, _ = conversation_text([(sample["user"], None)], VICUNA_SYSTEM)
        assert prompt == sample["prompt"], name
        assert tokenize_text(prompt, tokenizer, PUBLISHED_IDS).ids == sample["input_ids"], name
    for text, sample in texts["plain"].items():
        assert tokenize_text(text, tokenizer, PUBLISHED_IDS).ids == sample["ids"], text
    for ids, expected in texts["decode"].items():
        assert tokenizer.decode(json.loads(ids), skip_special_tokens=True) == expected


def test_prompts_of_a_saved_processor(tmp_path):
    """The tokenizer of a converted checkpoint, saved and loaded, gives the published ids."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("prompt_labels")
    texts = prompts_of(case)
    tokenizer = load_llama_tokenizer(case.folder)
    soft = dict.fromkeys(MEDIA_KINDS, 1)
    UniMoEProcessor(tokenizer, num_soft_tokens=soft).save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path).tokenizer
    own = {kind: loaded.convert_tokens_to_ids(f"<{kind}>") for kind in MEDIA_KINDS}
    assert sorted(own.values()) == list(range(case.config["spm"]["vocab"], len(loaded)))
    published = {own[kind]: PUBLISHED_IDS[kind] for kind in own}
    for name, sample in texts["legacy_false"]["inference"].items():
        ids = tokenize_text(sample["prompt"], loaded, own).ids
        assert [published.get(token, token) for token in ids] == sample["input_ids"], name


@pytest.mark.parametrize("name", ["truncated_text_only", "truncated_with_media"])
def test_truncation(published_text, name):
    _, texts, tokenizer = published_text
    sample = texts[name]
    turns = turns_of(sample["conversation"])
    own = tokenize_conversation(turns, tokenizer, PUBLISHED_IDS, VICUNA_SYSTEM)
    cut, _ = truncated(
        own, PUBLISHED_IDS, [1] * len(own.items(PUBLISHED_IDS)), len(sample["input_ids"])
    )
    assert cut.ids == sample["input_ids"]
    assert cut.labels == sample["labels"]
    if "with_media" in name:
        # Published samples are cut later, placeholders and all; the item then goes to another one.
        at = own.ids.index(PUBLISHED_IDS["image"])
        for most in (at, at + 1, at + 575, at + 576):
            cut, items = truncated(own, PUBLISHED_IDS, [576], most)
            assert items == (most == at + 576)
            assert len(cut.expanded(PUBLISHED_IDS, [576] * items).ids) == at + 576 * items
