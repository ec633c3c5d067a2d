"""A recipe on data that the test makes: pictures, recordings, LLaVA-style JSON, a tiny LLaMA."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
TONES = {"low": 300.0, "middle": 1200.0, "high": 3000.0}
ITEMS = 60
EARS = '''
import torch
from unimoe_model.encoders import FrozenEncoder


class Ears(FrozenEncoder):
    """Energy of eight bands, four times a second."""

    sample_rate = 16000

    def __init__(self):
        super().__init__("bands", 8)
        self.register_buffer("scale", torch.ones(1))
        self.freeze()

    @classmethod
    def pretrained(cls):
        return cls()

    def encode_recording(self, samples):
        frames = torch.from_numpy(samples).unfold(0, 4000, 4000)
        energy = torch.fft.rfft(frames).abs()[:, :2000].unflatten(1, (8, 250)).mean(2)
        return [energy.log1p() * self.scale]
'''
RECIPE = """
seed: 3
precision: fp32
checkpoint_seconds: {checkpoint_seconds}
model: llama
encoders: {{vision: clip, speech: whisper, audio: "ears:Ears"}}
connectors:
  speech: {{queries: 3, max_frames: 25, pretrained: whisper}}
  audio:
    queries: 2
    sizes: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 16, cross_attention_frequency: 1, hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0}}
data:
  pictures: {{file: pictures.json, media: media}}
  words: words.jsonl
  tones: tones.jsonl
stages:
  - name: align
    train: connectors
    data: {{pictures: 1, words: 1, tones: 1}}
    steps: 6
    batch_size: 6
    learning_rate: 3.0e-3
  - name: eyes
    train: {{ffn: {{lora: 4}}}}
    data: [pictures]
    epochs: 1
    batch_size: 12
    learning_rate: 3.0e-3
  - name: ears
    from: align
    train: {{ffn: {{lora: 4}}, projectors.audio: whole}}
    data: {{tones: 2, words: 1}}
    steps: 5
    batch_size: 6
    accumulation: 2
    learning_rate: 3.0e-3
  - name: tune
    assemble: {{experts: [eyes, ears], top_k: 1, router_strength: 2,
               options: {{load_balancing_coef: 0.01}}}}
    train: {{experts: {{lora: 2, alpha: 4}}, attention: {{lora: 2, alpha: 4}},
            router: whole, projectors: whole}}
    data: {{pictures: 1, words: 1, tones: 1}}
    steps: 6
    batch_size: 6
    part_tokens: 64
    learning_rate: 3.0e-3
evaluate:
  colors: {{data: held_out.jsonl, metric: exact, max_new_tokens: 2, limit: 3}}
"""


def write_case(folder: Path, checkpoint_seconds: float = 60.0) -> Path:
    """Writes models, media, data and the recipe; returns the recipe's path."""
    media = folder / "media"
    media.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures, words, tones = [], [], []
    for number in range(ITEMS):
        color = list(COLORS)[number % 3]
        size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)))
        Image.new("RGB", size, COLORS[color]).save(media / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is it?"},
            {"from": "gpt", "value": color},
        ]
        if number % 4 == 0:
            turns += [
                {"from": "human", "value": "are you sure?"},
                {"from": "gpt", "value": f"yes, {color}"},
            ]
        pictures.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        tone = list(TONES)[number % 3]
        times = np.arange(int(rng.integers(6000, 9000))) / 16000
        wave = 0.4 * np.sin(2 * np.pi * TONES[tone] * times)
        soundfile.write(media / f"{number}.wav", wave.astype(np.float32), 16000)
        kind = "speech" if number % 2 else "audio"
        line = {"id": number, kind: f"media/{number}.wav", "question": "how high?", "answer": tone}
        (words if kind == "speech" else tones).append(line)
    (folder / "pictures.json").write_text(json.dumps(pictures))
    for name, lines in (("words", words), ("tones", tones)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = [
        {"id": i, "image": f"media/{i}.png", "question": "what color is it?", "answer": color}
        for i, color in enumerate(COLORS)
    ]
    text = "".join(json.dumps(line) + "\n" for line in held_out)
    (folder / "held_out.jsonl").write_text(text)
    (folder / "ears.py").write_text(EARS)
    _write_models(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(checkpoint_seconds=checkpoint_seconds))
    return recipe


def _write_models(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what color is it? red green blue", "how high? low"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    fast.save_pretrained(folder / "llama")
    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    whisper = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=25,
        max_target_positions=8,
        vocab_size=20,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperForConditionalGeneration(whisper).save_pretrained(folder / "whisper")


def changed_case(case: Path, folder: Path, edit: Callable[[dict], object]) -> Path:
    """Copies a case to a new folder, edits the mapping of its recipe; returns the recipe's path."""
    shutil.copytree(case.parent, folder)
    raw = yaml.safe_load(case.read_text())
    edit(raw)
    (folder / case.name).write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder / case.name
