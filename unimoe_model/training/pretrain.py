"""`unimoe pretrain`: the small LLM that `language_model` of a configuration names."""

import shutil
from pathlib import Path

import torch

from unimoe_model.checkpoints.writing import refuse_existing
from unimoe_model.data.collate import Collator
from unimoe_model.data.easy_vqa import question_texts
from unimoe_model.data.examples import MediaBank
from unimoe_model.data.mixture import Mixture
from unimoe_model.data.tasks import text_examples
from unimoe_model.data.text import HELD_OUT_PAIRS, reading_examples
from unimoe_model.data.tokenizer import train_on_examples
from unimoe_model.encoders.whisper import load_decoder
from unimoe_model.evaluation.accuracy import accuracy, generate_answers
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.base import dense_config
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.language_model import save_language_model
from unimoe_model.training.loop import train_stage
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.settings import RunSettings


def pretrain_language_model(
    settings: RunSettings, folder: Path, reporter: ProgressReporter, device: torch.device
) -> float:
    """Trains a tokenizer and a LLaMA on the demo's text and writes both to a folder.

    A run that was stopped continues from its last checkpoint, kept in `<folder>.training`.

    Args:
        settings: sizes and seed, and the stage `pretrain`.
        folder: must not exist yet.
        reporter: is told of the progress.
        device: where to train.

    Returns:
        Accuracy on questions about colour and shape pairs that no training text holds.

    Raises:
        ValueError: If the settings have no `pretrain`, the folder exists, or a task of the stage
            is no text task.
    """
    stage = settings.pretrain
    if stage is None:
        raise ValueError("config must have a section pretrain, which says how to train the LLM")
    refuse_existing(folder)
    tasks = text_examples(settings.seed)
    mixture = Mixture(tasks, stage.tasks, seed=(settings.seed, 0))
    tokenizer = train_on_examples(tasks, settings.model.vocab_size)
    torch.manual_seed(settings.seed)
    config = dense_config(settings.model, settings.model.text, tokenizer, load_decoder())
    model = UniMoEForConditionalGeneration(config).to(device)
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    collator = Collator(tokenizer, config, MediaBank())
    size = stage.optimizer.batch_size
    training = folder.with_name(f"{folder.name}.training")
    training.mkdir(parents=True, exist_ok=True)
    train_stage(
        model,
        {name: p for name, p in model.named_parameters() if "_connector." not in name},
        lambda step: collator.training(mixture.batch(step, size)),
        stage.optimizer,
        training,
        fingerprint([settings.result_facts(), settings.resolved_precision(device)]),
        "pretrain",
        reporter,
        settings.resolved_precision(device),
    )
    save_language_model(model, tokenizer, folder)
    shutil.rmtree(training)
    held_out = reading_examples(question_texts(), HELD_OUT_PAIRS["test"])
    return accuracy(generate_answers(model, tokenizer, collator, held_out), held_out)
