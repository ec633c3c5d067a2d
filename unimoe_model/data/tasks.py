"""The demo's tasks: examples of each split, and the bank of features they point into."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from unimoe_model.data import easy_vqa, general_midi, spoken, sprites
from unimoe_model.data.examples import Example, MediaBank, MediaRef
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.limits import DataLimits
from unimoe_model.data.media_set import MediaSet
from unimoe_model.data.text import (
    ASK_FAMILY,
    ASK_INSTRUMENT,
    ASK_MOTION,
    ASK_PICTURE,
    ASK_TRANSCRIPT,
    ASK_WORD,
    HELD_OUT_PAIRS,
    pretraining_tasks,
    reading_examples,
)


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders whose features the tasks hold."""

    vision: torch.nn.Module
    speech: torch.nn.Module
    audio: torch.nn.Module


def pad_frames(features: torch.Tensor, frames: int) -> torch.Tensor:
    """Pads `[M, n, C]` with zero rows, or cuts it, to `frames` rows."""
    if features.shape[1] >= frames:
        return features[:, :frames]
    return torch.nn.functional.pad(features, (0, 0, 0, frames - features.shape[1]))


class TaskBuilder:
    """Builds the examples of the splits; features are computed at most once and cached.

    Args:
        cache: keeps the encoders' features on disk.
        encoders: the frozen encoders.
        speech_max_frames: rows every speech clip is padded to.
        seed: decides which pictures spoken questions are about, and which items are drawn.
        limits: most items of the larger sets in the split `"train"`.
    """

    def __init__(
        self,
        cache: FeatureCache,
        encoders: Encoders,
        speech_max_frames: int,
        seed: int,
        limits: DataLimits | None = None,
    ):
        self.bank = MediaBank()
        self._cache = cache
        self._encoders = encoders
        self._speech_max_frames = speech_max_frames
        self._seed = seed
        self._limits = limits or DataLimits()
        self.question_texts = easy_vqa.question_texts()

    def media_examples(self, split: str) -> dict[str, list[Example]]:
        """All examples with media of a split, by task.

        Args:
            split: `"train"`, `"validation"` or `"test"`.

        Returns:
            Tasks `image_qa`, `spoken_word`, `spoken_question`, `sound`, `video` (the evaluated
            ones) and `picture`, `transcript`, `instrument` (what stage 1 aligns with).
        """
        pictures, asked = self._pictures(split)
        return {
            **pictures,
            **self._speech(split, asked),
            **self._sounds(split),
            **self._videos(split),
        }

    def text_examples(self) -> dict[str, list[Example]]:
        """The text tasks; see `text_examples`."""
        return text_examples(self._seed)

    def held_out_text(self, split: str) -> list[Example]:
        """Questions about sentences whose colour and shape no training text has together."""
        return reading_examples(self.question_texts, HELD_OUT_PAIRS[split])

    def _limits_of(self, split: str) -> DataLimits:
        return self._limits if split == "train" else DataLimits()

    def _add(self, kind: str, source: str, features: torch.Tensor) -> None:
        if kind == "speech":
            features = pad_frames(features, self._speech_max_frames)
        self.bank.add(source, kind, features)

    def _pictures(self, split: str) -> tuple[dict[str, list[Example]], list[Example]]:
        limits = self._limits_of(split)
        media = easy_vqa.load(self._cache, self._encoders.vision, split, limits.pictures)
        source = f"easy_vqa/{split}"
        self._add("image", source, media.features)
        refs = [(MediaRef("image", source, i),) for i in range(len(media))]
        qa = [
            Example("image_qa", q.question, q.answer, refs[q.image_index], blind_key=q.question)
            for q in easy_vqa.questions(split)
            if q.image_index < len(refs)
        ]
        captions = [
            Example("picture", ASK_PICTURE, f"a {label['color']} {label['shape']}", refs[i])
            for i, label in enumerate(media.labels)
            if {"color", "shape"} <= label.keys()
        ]
        return {"image_qa": qa, "picture": captions}, qa

    def _speech(self, split: str, asked: Sequence[Example]) -> dict[str, list[Example]]:
        encoder, limits = self._encoders.speech, self._limits_of(split)
        words = spoken.words(self._cache, encoder, split, limits.words, self._seed)
        questions = spoken.questions(
            self._cache, encoder, self.question_texts, split, limits.questions, self._seed
        )
        self._add("speech", f"words/{split}", words.features)
        self._add("speech", f"questions/{split}", questions.features)
        word_refs = _refs("speech", f"words/{split}", words)
        question_refs = _refs("speech", f"questions/{split}", questions)
        return {
            "spoken_word": [
                Example("spoken_word", ASK_WORD, label["word"], (ref,), blind_key=ASK_WORD)
                for ref, label in zip(word_refs, words.labels, strict=True)
            ],
            "transcript": [
                Example("transcript", ASK_TRANSCRIPT, label["text"], (ref,))
                for ref, label in zip(question_refs, questions.labels, strict=True)
            ],
            "spoken_question": self._spoken_questions(split, questions, question_refs, asked),
        }

    def _spoken_questions(
        self,
        split: str,
        clips: MediaSet,
        refs: Sequence[MediaRef],
        asked: Sequence[Example],
    ) -> list[Example]:
        by_text = defaultdict(list)
        for example in asked:
            by_text[example.question].append(example)
        rng = random.Random(f"{self._seed}/{split}")
        pictures_each = 20 if split == "train" else 1
        examples = []
        for ref, label in zip(refs, clips.labels, strict=True):
            candidates = by_text[label["text"]]
            for about in rng.sample(candidates, min(pictures_each, len(candidates))):
                media = (*about.media, ref)
                examples.append(
                    Example("spoken_question", "", about.answer, media, blind_key=label["text"])
                )
        return examples

    def _sounds(self, split: str) -> dict[str, list[Example]]:
        most = self._limits_of(split).sounds
        media = general_midi.load(self._cache, self._encoders.audio, split, most, self._seed)
        source = f"general_midi/{split}"
        self._add("audio", source, media.features)
        refs = _refs("audio", source, media)
        pairs = list(zip(refs, media.labels, strict=True))
        return {
            "sound": [
                Example("sound", ASK_FAMILY, label["family"], (ref,), blind_key=ASK_FAMILY)
                for ref, label in pairs
            ],
            "instrument": [
                Example("instrument", ASK_INSTRUMENT, label["instrument"], (ref,))
                for ref, label in pairs
            ],
        }

    def _videos(self, split: str) -> dict[str, list[Example]]:
        clips = sprites.SPLIT_SIZES[split]
        most = min(clips, self._limits_of(split).videos or clips)
        media = sprites.load(self._cache, self._encoders.vision, split, most)
        source = f"sprites/{split}"
        frames = rearrange(media.features, "m (frames n) c -> m frames n c", frames=8)
        self._add("video", source, frames)
        return {
            "video": [
                Example("video", ASK_MOTION, label["motion"], (ref,), blind_key=ASK_MOTION)
                for ref, label in zip(_refs("video", source, media), media.labels, strict=True)
            ]
        }


def media_counts(limits: DataLimits) -> dict[str, int]:
    """Items of every media set that training and evaluation take, by its name in the cache."""
    texts = easy_vqa.question_texts()
    whole = {
        split: {
            "easy_vqa": easy_vqa.num_pictures(split),
            "spoken_words": len(spoken.WORDS) * len(spoken.WORD_VOICES[split]),
            "spoken_questions": len(spoken.question_phrases(texts, split)),
            "general_midi": len(general_midi.notes_of(split)),
            "sprites": sprites.SPLIT_SIZES[split],
        }
        for split in ("train", "test")
    }
    most = (limits.pictures, limits.words, limits.questions, limits.sounds, limits.videos)
    for (name, count), limit in zip(list(whole["train"].items()), most, strict=True):
        whole["train"][name] = min(count, limit or count)
    return {f"{name}-{split}": n for split, sets in whole.items() for name, n in sets.items()}


def text_examples(seed: int) -> dict[str, list[Example]]:
    """The text tasks of pretraining; `text` is the one that stage 3 keeps and the demo tests."""
    pairs = {(label.get("color"), label.get("shape")) for label in easy_vqa.labels("train")}
    return pretraining_tasks(
        questions=easy_vqa.question_texts(),
        pairs=sorted(pair for pair in pairs if None not in pair),
        families={
            name: general_midi.family_of(program)
            for program, name in enumerate(general_midi.INSTRUMENTS)
        },
        motions=sprites.MOTIONS,
        things=[sprites.sprite_name(c) for c in sprites.concepts("train")][:200],
        words=spoken.WORDS,
        seed=seed,
    )


def _refs(kind: str, source: str, media: MediaSet) -> list[MediaRef]:
    return [MediaRef(kind, source, index) for index in range(len(media))]
