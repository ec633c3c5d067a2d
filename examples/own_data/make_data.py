"""Draws pictures, synthesises tones, and writes LLaVA-style JSON and a recipe.

Example:
    python examples/own_data/make_data.py runs/own_data
    unimoe train runs/own_data/recipe.yaml --output runs/own_data/run
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": "#d33", "green": "#2a4", "blue": "#34d", "yellow": "#dc2"}
SHAPES = ("circle", "square", "triangle")
TONES = {"low": 220, "middle": 880, "high": 3520}
SAMPLE_RATE = 16000


def draw(path: Path, color: str, shape: str, rng: np.random.Generator) -> None:
    """Draws a filled shape at a random position on a grey picture."""
    picture = Image.new("RGB", (96, 96), tuple(rng.integers(90, 160, 3)))
    pen = ImageDraw.Draw(picture)
    size = int(rng.integers(30, 60))
    x, y = (int(v) for v in rng.integers(0, 96 - size, 2))
    box = (x, y, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pen.rectangle(box, fill=COLORS[color])
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLORS[color])
    picture.save(path)


def play(path: Path, tone: str, rng: np.random.Generator) -> None:
    """Synthesises half a second of a noisy tone near the named pitch."""
    times = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    hertz = TONES[tone] * rng.uniform(0.8, 1.25)
    sound = 0.5 * np.sin(2 * np.pi * hertz * times) + 0.02 * rng.standard_normal(times.size)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((32000 * sound.clip(-1, 1)).astype("<i2").tobytes())


def conversation(number: int, key: str, file: str, question: str, answer: str) -> dict:
    """An item of LLaVA's JSON."""
    return {
        "id": f"{key}-{number}",
        key: file,
        "conversations": [
            {"from": "human", "value": f"<{key}>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """Writes media and data of a split; the held-out split in the format of `unimoe eval`."""
    rng = np.random.default_rng(seed)
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    pictures, sounds = [], []
    for number in range(count):
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
        picture = f"{split}-{number}.png"
        draw(media / picture, color, shape, rng)
        asked = ("what color is the shape?", color) if number % 2 else ("what shape is it?", shape)
        pictures.append(conversation(number, "image", picture, *asked))
        tone = str(rng.choice(list(TONES)))
        sound = f"{split}-{number}.wav"
        play(media / sound, tone, rng)
        sounds.append(conversation(number, "audio", sound, "how high is the tone?", tone))
    for name, items in (("pictures", pictures), ("sounds", sounds)):
        if split == "train":
            (folder / f"{name}.json").write_text(json.dumps(items, indent=1))
            continue
        lines = [as_question(item) for item in items]
        (folder / f"{name}-{split}.jsonl").write_text("".join(lines))


def as_question(item: dict) -> str:
    """Converts a conversation to a line of `unimoe eval`."""
    key = "image" if "image" in item else "audio"
    asked, answered = (turn["value"] for turn in item["conversations"])
    question = asked.split("\n", 1)[1]
    line = {"id": item["id"], key: f"media/{item[key]}", "question": question, "answer": answered}
    return json.dumps(line) + "\n"


def main() -> None:
    """Writes data and recipe to a folder."""
    folder = Path(sys.argv[1])
    write_split(folder, "train", 600, seed=0)
    write_split(folder, "test", 60, seed=1)
    here = Path(__file__).resolve().parent
    recipe = (here / "recipe.yaml").read_text(encoding="utf-8")
    llama = here.parent / "demo" / "language_model"
    (folder / "recipe.yaml").write_text(recipe.replace("LLAMA", str(llama)), encoding="utf-8")
    print(f"data and recipe in {folder}")


if __name__ == "__main__":
    main()
