"""What a run is trained and tested on: the demo's encoders and tasks."""

from pathlib import Path

import torch

from unimoe_model.data import easy_vqa
from unimoe_model.data.examples import EVALUATED_TASKS, Example
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.limits import draw
from unimoe_model.data.tasks import Encoders, TaskBuilder, media_counts
from unimoe_model.data.text import HELD_OUT_PAIRS, reading_examples
from unimoe_model.encoders import build_encoder
from unimoe_model.training.settings import RunSettings


def build_encoders(settings: RunSettings, device: torch.device) -> Encoders:
    """The demo's encoders.

    Vision and speech are encoded in bfloat16 where the run trains in it (3 to 4 times faster on a
    CPU with AVX512-BF16); the small sound network gains nothing.
    """
    bf16 = settings.resolved_precision(device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Encoders(
        vision=build_encoder("efficientnet-lite0", "vision").to(device, dtype),
        speech=build_encoder("whisper-tiny.en", "speech").to(device, dtype),
        audio=build_encoder("aisfx", "audio").to(device),
    )


def build_tasks(settings: RunSettings, cache_folder: Path, device: torch.device) -> TaskBuilder:
    """The tasks of a run, over the demo's encoders and a cache of their features."""
    return TaskBuilder(
        FeatureCache(cache_folder),
        build_encoders(settings, device),
        settings.model.speech_max_frames,
        settings.seed,
        settings.data,
    )


def held_out_examples(
    settings: RunSettings, builder: TaskBuilder, split: str = "test"
) -> dict[str, list[Example]]:
    """The held-out items of the six tasks, sampled as the settings say."""
    tasks = builder.media_examples(split) | {"text": builder.held_out_text(split)}
    return {
        name: draw(tasks[name], settings.evaluation.get(name), settings.seed)
        for name in EVALUATED_TASKS
    }


def held_out_counts(settings: RunSettings) -> dict[str, int]:
    """Items that `held_out_examples` returns of each task, without features of them.

    Of spoken questions, a few fewer may have a picture that they can be asked about.
    """
    sets = media_counts(settings.data)
    counts = {
        "image_qa": len(easy_vqa.questions("test")),
        "spoken_word": sets["spoken_words-test"],
        "spoken_question": sets["spoken_questions-test"],
        "sound": sets["general_midi-test"],
        "video": sets["sprites-test"],
        "text": len(reading_examples(easy_vqa.question_texts(), HELD_OUT_PAIRS["test"])),
    }
    return {task: min(n, settings.evaluation.get(task, n)) for task, n in counts.items()}
