"""A Uni-MoE of a few thousand weights, and random features in the shapes of encoder outputs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unimoe_model.cli import main
from unimoe_model.configuration import BLIP2_QFORMER, WHISPER_SMALL_DECODER, UniMoEConfig
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.modeling import UniMoEForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("published", "published_checks")

VOCAB = 300
SPEECH_DECODER = {
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "max_target_positions": 8,
    "init_std": 0.3,
}
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "cross_attention_frequency": 1,
}


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["what shape is it? a red circle", "which word? yes no"] * 3, VOCAB)


@pytest.fixture
def tiny_config(tokenizer):
    """Makes a configuration; weights start large, so that outputs are of order one."""

    def build(**fields):
        text = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
            "initializer_range": 0.2,
            "max_position_embeddings": 128,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        text |= fields.pop("text_config", {})
        kinds = ("image", "video", "speech", "audio")
        defaults = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "vision_encoder": "fake-vision",
            "vision_feature_size": 12,
            "vision_num_tokens": 3,
            "video_num_frames": 2,
            "speech_encoder": "fake-speech",
            "speech_feature_size": 16,
            "speech_max_frames": 6,
            "speech_connector": SPEECH_DECODER,
            "speech_num_queries": 4,
            "audio_encoder": "fake-audio",
            "audio_feature_size": 10,
            "audio_connector": QFORMER,
            "audio_num_queries": 2,
            "media_token_ids": {k: tokenizer.convert_tokens_to_ids(f"<{k}>") for k in kinds},
        }
        return UniMoEConfig(text_config=text, **(defaults | fields))

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """Makes a model in eval mode, equal for equal arguments."""

    def build(**fields):
        torch.manual_seed(7)
        return UniMoEForConditionalGeneration(tiny_config(**fields)).eval()

    return build


@pytest.fixture
def features():
    """Makes random features of `count` items of a media kind."""
    shapes = {"image": (3, 12), "video": (2, 3, 12), "speech": (6, 16), "audio": (5, 10)}

    def build(kind, count=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *shapes[kind], generator=generator)

    return build


@pytest.fixture
def media_prompt(tokenizer):
    """Makes `[1, S]` ids of a prompt with expanded placeholders, in the order of `kinds`."""
    repeats = {"image": 3, "video": 3, "speech": 4, "audio": 2}

    def build(*kinds, question="what shape is it?"):
        media = "".join(f"<{kind}>" * repeats[kind] for kind in kinds)
        text = f"{tokenizer.bos_token}USER: {media}{question} ASSISTANT:"
        return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])

    return build


@pytest.fixture
def encoders(monkeypatch):
    """Encoders of the tiny model that need no weights."""
    from fakes import FAKES

    monkeypatch.setattr("unimoe_model.processing._BUILT", dict(FAKES))


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, encoders):
    """Saves a model whose generation config samples by default; returns its folder."""
    from unimoe_model.processing import UniMoEProcessor

    def save(name="model", **fields):
        model = tiny_model(**fields)
        model.generation_config.do_sample = True
        model.save_pretrained(tmp_path / name)
        UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def lines(tmp_path):
    """Media of all kinds, and the lines of a data file about them."""
    import soundfile
    from PIL import Image

    for i, color in enumerate(("red", "blue", "white")):
        Image.new("RGB", (20, 30), color).save(tmp_path / f"{color}.png")
        times = np.arange(16, dtype=np.float32) / 16000
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * (i + 1) * np.sin(2000 * times), 16000)
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    asked = {"question": "what shape is it?", "answer": "a red circle"}
    return [
        {"id": "p", "image": "red.png", **asked},
        {"id": "pp", "image": ["blue.png", "white.png"], **asked},
        {"id": 3, "speech": "0.wav", "image": "white.png", "answer": "yes no"},
        {"id": 4, "audio": ["1.wav", "2.wav"], **asked},
        {"id": 5, "video": "video.gif", "question": "which word?", "answer": "yes"},
        {"id": 6, "question": "what? yes", "answer": "no"},
    ]


@pytest.fixture
def data(tmp_path):
    """Writes the lines of a data file."""

    def write(lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def write_talks(tmp_path):
    """Writes a file, given as bytes, text, or a list of objects, beside some files of media."""
    for name in ("a.png", "b.png", "q.wav"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "frames").mkdir()

    def save(content, name="data.json"):
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return save


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, stdout, and the line of the error, if any."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        errors = [line for line in shown.err.splitlines() if line.startswith("unimoe ")]
        assert len(errors) == (code == 1)
        return code, shown.out, "".join(errors)

    return call


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-fallback LLaMA tokenizer of as many tokens as published_checkpoints have."""
    from published_checkpoints import VOCAB
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijk"]
    vocabulary += [f"filler{i}" for i in range(VOCAB - len(vocabulary))]
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    folder = tmp_path_factory.mktemp("tokenizer")
    LlamaTokenizer(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        vocab=model and {token: i for i, token in enumerate(vocabulary)},
        merges=[],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def shallow_connectors(monkeypatch):
    """Limits connectors that a checkpoint lacks to one layer, to save time."""
    monkeypatch.setitem(WHISPER_SMALL_DECODER, "decoder_layers", 1)
    monkeypatch.setitem(BLIP2_QFORMER, "num_hidden_layers", 1)
