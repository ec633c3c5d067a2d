"""Every example, at a small size."""

from pathlib import Path

import torch
from load_example import EXAMPLES, example
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def test_drop_in():
    assert example("drop_in").main(steps=150) > 0.5


def test_transformers_moe(capsys):
    errors = example("transformers_moe").main(None, width=64, tokens=32, rounds=1)
    assert errors["eager"] == 0
    assert 0 < errors["unimoe"] < 1e-5
    assert "unimoe" in capsys.readouterr().out


def bytes_tokenizer():
    """A tokenizer whose tokens are single bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_upcycle_smollm2(capsys, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    before, after = example("upcycle_smollm2").main(
        LlamaForCausalLM(config),
        bytes_tokenizer(),
        steps=30,
        layers=1,
        length=32,
        held_out=2,
        folder=tmp_path,
    )
    assert after < 0.97 * before
    assert "parameters learn" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_every_example_is_tested():
    tests = Path(__file__).parent.glob("test_*.py")
    tested = "".join(path.read_text(encoding="utf-8") for path in tests)
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tested
