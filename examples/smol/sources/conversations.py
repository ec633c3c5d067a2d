"""Prompts of chatterbot-corpus, answered once by SmolLM2 itself.

What the model is trained on is then what it would have said, and it forgets less.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smol.language_model import answers
from examples.stand_ins.assets import asset_folder
from unimoe_kernels import atomic_write
from unimoe_model.precision import resolve_precision
from unimoe_model.training.progress import ProgressReporter

LEFT_OUT = ("coding", "tech_support")
"""Files whose prompts ask for code, or say ten things in a thousand ways."""
_MOST_WORDS = 20
_BATCH = 32
_MOST_TOKENS = 48
_SENTENCES = re.compile(r"^.*[.!?](?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        name: the file that it is in, and its number there.
        text: what the user says.
        reply: what the corpus has as an answer; empty where it has none.
    """

    name: str
    text: str
    reply: str


def prompts() -> list[Prompt]:
    """All different prompts of at most 20 words, in the order of the files.

    Raises:
        MissingAssetError: If chatterbot-corpus is not installed.
    """
    found: dict[str, Prompt] = {}
    for path in sorted((asset_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        if path.stem in LEFT_OUT:
            continue
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for number, turns in enumerate(document["conversations"]):
            said = [" ".join(str(turn).split()) for turn in turns]
            if 0 < len(said[0].split()) <= _MOST_WORDS:
                reply = said[1] if len(said) > 1 else ""
                prompt = Prompt(f"{path.stem}/{number}", said[0], reply)
                found.setdefault(said[0].lower(), prompt)
    return list(found.values())


def answered(
    asked: Sequence[Prompt], language_model: Path, cache: Path, reporter: ProgressReporter
) -> dict[str, str]:
    """What the language model says to each prompt, up to its last whole sentence.

    Answers that a former call generated are read from the cache, which is written batch by batch.

    Args:
        asked: the prompts.
        language_model: folder of transformers.
        cache: JSON file of answers by prompt.
        reporter: shows a bar if something is generated.

    Returns:
        Answers by text of the prompt; a prompt without a whole sentence of an answer is left out.
    """
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    missing = [prompt.text for prompt in asked if prompt.text not in known]
    if missing:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(language_model)
        model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype).to(device).eval()
        # Prompts of one length need no padding.
        missing.sort(key=len)
        reporter.start("answers of SmolLM2", len(asked), len(asked) - len(missing))
        try:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                said = answers(model, tokenizer, batch, _MOST_TOKENS)
                pairs = zip(batch, said, strict=True)
                known |= {prompt: whole_sentences(*answer) for prompt, answer in pairs}
                _write(cache, known)
                reporter.advance(len(batch))
        finally:
            reporter.finish()
    texts = [prompt.text for prompt in asked]
    return {text: known[text] for text in texts if known.get(text)}


def whole_sentences(text: str, ended: bool) -> str:
    """An answer that came to its end, else what there is of it up to the last full stop."""
    if ended:
        return text
    match = _SENTENCES.match(text)
    return match[0].strip() if match else ""


def _write(path: Path, known: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
