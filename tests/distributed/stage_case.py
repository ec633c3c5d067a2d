"""A recipe of six small stages on media of all kinds, made of what `recipe_case` writes."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parent.parent / "model"))

STAGES = ("words", "align", "eyes", "ears", "assemble", "tune")
RECIPE = """
seed: 3
precision: fp32
model:
  sizes: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
          max_position_embeddings: 160, initializer_range: 0.1}
  vocab_size: 300
encoders: {vision: clip, speech: whisper, audio: "ears:Ears"}
connectors:
  vocabulary_sharpness: 5
  speech: {queries: 3, max_frames: 25, pretrained: whisper}
  audio:
    queries: 2
    sizes: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 16, cross_attention_frequency: 1, hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0}
video_frames: 2
data:
  texts: texts.jsonl
  pictures: {file: pictures.json, media: media}
  videos: videos.jsonl
  words: words.jsonl
  tones: tones.jsonl
stages:
  - name: words
    train: language_model
    data: [texts]
    steps: 3
    batch_size: 7
    learning_rate: 1.0e-2
    muon_learning_rate: 1.0e-2
  - name: align
    train: connectors
    data: {pictures: 1, videos: 1, words: 1, tones: 1}
    steps: 3
    batch_size: 9
    accumulation: 2
    learning_rate: 1.0e-2
  - name: eyes
    train: {ffn: {lora: 3, alpha: 6}}
    data: {pictures: 1, videos: 1, words: 1}
    steps: 3
    gradient_checkpointing: true
    batch_size: 12
    part_tokens: 64
    learning_rate: 1.0e-2
  - name: ears
    from: align
    train: {ffn: {lora: 3, alpha: 6}, projectors.audio: whole}
    data: [tones]
    steps: 3
    batch_size: 6
    learning_rate: 1.0e-2
  - name: assemble
    from: align
    assemble: {experts: [words, align, eyes, ears], top_k: 2, router_strength: 3,
               connectors: {audio: ears}, options: {load_balancing_coef: 0.1}}
    train: [experts, router]
    data: {pictures: 1, tones: 1, texts: 1}
    steps: 3
    batch_size: 5
    learning_rate: 1.0e-2
  - name: tune
    train: {experts: {lora: 2, alpha: 4}, attention: {lora: 2, alpha: 4}, router: whole,
            projectors: whole}
    data_in_turn: [{pictures: 1, videos: 1, tones: 1}, {words: 1, texts: 1}]
    steps: 6
    gradient_checkpointing: true
    batch_size: 10
    accumulation: 2
    learning_rate: 1.0e-2
evaluate:
  colors: {data: held_out.jsonl, metric: exact, max_new_tokens: 2, limit: 3}
"""


def write_stages(folder: Path, **top: Any) -> Path:
    """Writes models, media, data and the recipe, with `top` at its top; returns its path."""
    from PIL import Image
    from recipe_case import COLORS, write_case

    recipe = write_case(folder)
    texts, videos, before = [], [], (0, 0, 0)
    for name, color in COLORS.items():
        answer = "yes" if name == "red" else f"no, it is {name}"
        texts.append({"id": name, "question": f"is a {name} circle red?", "answer": answer})
        first, second = (Image.new("RGB", (32, 24), own) for own in (color, before))
        first.save(folder / f"media/{name}.gif", save_all=True, append_images=[second])
        file = f"media/{name}.gif"
        videos.append({"id": name, "video": file, "question": "what is first?", "answer": name})
        before = color
    for name, lines in (("texts", texts), ("videos", videos)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe.write_text(f"{RECIPE}{yaml.safe_dump(top) if top else ''}", encoding="utf-8")
    return recipe
