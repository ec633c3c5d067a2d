"""The demo on a few items of its data, in the process that trains an arm too."""

from collections.abc import Callable

from unimoe_model.data import easy_vqa, general_midi, spoken, sprites, text
from unimoe_model.training import parts

LEARN = "steps: 200, batch_size: 16, learning_rate: 5.0e-3"  # enough to answer with words
STEP = "steps: 2, batch_size: 4, learning_rate: 1.0e-3"
SETTINGS = f"""
seed: 0
precision: fp32
model:
  text: {{hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
  vocab_size: 400
  top_k: 2
  speech_max_frames: 72
  speech_num_queries: 2
  audio_num_queries: 2
  audio_connector:
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    intermediate_size: 32
pretrain:
  {{{LEARN}, tasks: {{text: 1, asked: 1, wider: 1, repeat: 1, sounds: 1, moving: 1, talk: 1}}}}
align: {{{STEP}, tasks: {{picture: 1, transcript: 1, instrument: 1, video: 1}}}}
experts:
  image: {{{STEP}, tasks: {{image_qa: 1}}}}
  video: {{{STEP}, tasks: {{video: 1}}}}
  speech: {{{STEP}, tasks: {{spoken_word: 1}}}}
  audio: {{{STEP}, tasks: {{sound: 1}}}}
tune: {{{STEP}, tasks: {{image_qa: 1, spoken_question: 1, sound: 1, video: 1, text: 1}}}}
expert_lora_rank: 2
expert_lora_alpha: 2
lora_rank: 2
lora_alpha: 2
evaluation:
  {{image_qa: 6, spoken_word: 6, spoken_question: 6, sound: 6, video: 4, text: 6}}
"""
LAYER = {"hidden_size": 16, "intermediate_size": 16, "num_experts": 4, "top_k": 2, "tokens": 8}


def take_few(replace: Callable[[object, str, object], None]) -> None:
    """Leaves a few items of each data set; all that decides their number is a constant."""
    splits = {"train": ("train", 0, 12), "validation": ("train", 12, 2), "test": ("test", 0, 6)}
    replace(easy_vqa, "_SPLITS", splits)
    for name in ("WORD_VOICES", "QUESTION_VOICES"):
        replace(spoken, name, {split: own[:1] for split, own in getattr(spoken, name).items()})
    notes = general_midi.PITCHES_AND_VELOCITIES
    few = {split: (pitches[:1], velocities[:1]) for split, (pitches, velocities) in notes.items()}
    replace(general_midi, "PITCHES_AND_VELOCITIES", few)
    replace(sprites, "SPLIT_SIZES", {"train": 8, "validation": 4, "test": 4})
    replace(text, "WIDER_EXAMPLES", 40)
    replace(text, "ASKED_EXAMPLES", 40)
    forget()


def forget() -> None:
    """Forgets the questions that were read for other splits."""
    easy_vqa.questions.cache_clear()
    easy_vqa.question_texts.cache_clear()


def run_part(*arguments) -> None:
    """Trains a part on the few items, in a fresh process."""
    take_few(setattr)
    parts.run_part(*arguments)
