"""Whisper base, whose weights come in two halves."""

import numpy as np
import pytest
import torch
from demo_assets import needs
from test_stand_in_whisper import file_bytes

from examples.stand_ins import packaged_whisper
from examples.stand_ins.assets import asset_file
from examples.stand_ins.ctranslate2 import read_ctranslate2
from examples.stand_ins.whisper_base import PACKAGES, WhisperBaseEncoder

PROMPT = [50_258, 50_259, 50_359, 50_363]  # transcript, English, transcribe, no time stamps
END = 50_257


def test_halves_of_a_file_are_read_as_one(tmp_path):
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.int16)}
    whole = file_bytes(tensors, {"c": "a"})
    halves = [tmp_path / "1", tmp_path / "2"]
    middle = len(whole) // 2
    for path, content in zip(halves, (whole[:middle], whole[middle:]), strict=True):
        path.write_bytes(content)
    read = read_ctranslate2(*halves)
    assert torch.equal(read["b"], tensors["b"])
    assert torch.equal(read["c"], tensors["a"])
    with pytest.raises(ValueError, match=r"2 \+ .*1: not a whole CTranslate2 model"):
        read_ctranslate2(*reversed(halves))
    with pytest.raises(ValueError, match="cut short"):
        read_ctranslate2(halves[0])


def test_sizes_need_no_weights():
    empty = WhisperBaseEncoder.empty()
    assert empty.feature_size == 512
    assert empty.name == "Whisper base"
    assert sum(p.numel() for p in empty.parameters()) == 20_590_592


@needs(*PACKAGES, "espeakng_loader")
def test_encoder_and_decoder_transcribe_a_sentence():
    pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
    from examples.demo.spoken import synthesize

    waveform = synthesize("What color is the triangle?", "en-us")
    window = np.zeros(10 * packaged_whisper.SAMPLE_RATE, np.float32)
    window[: len(waveform)] = waveform
    features = WhisperBaseEncoder.pretrained()(torch.from_numpy(window)[None])
    decoder = WhisperBaseEncoder.pretrained_decoder().eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            hidden = decoder(
                input_ids=torch.tensor([ids]), encoder_hidden_states=features, use_cache=False
            ).last_hidden_state[0, -1]
            best = int((decoder.embed_tokens.weight @ hidden).argmax())
            if best == END:
                break
            ids.append(best)
    names = asset_file(PACKAGES[0], "data", "vocabulary.txt")
    words = names.read_text(encoding="utf-8").split("\n")
    text = "".join(words[i] for i in ids[len(PROMPT) :]).replace("Ġ", " ")
    assert text == " What color is the triangle?"
