"""One arm of a run, from data to evaluated checkpoint."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels.distributed import finish_parallel
from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example, MediaBank
from unimoe_model.data.tokenizer import train_on_examples
from unimoe_model.encoders.whisper import load_decoder
from unimoe_model.evaluation.accuracy import accuracy, generate_answers
from unimoe_model.evaluation.files import write_whole
from unimoe_model.evaluation.routing import routing_shares
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.language_model import load_tokenizer
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.query_states import CACHED_KINDS
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.run_data import build_tasks, held_out_examples
from unimoe_model.training.settings import RunSettings
from unimoe_model.training.stages import Trainer

ROUTED_EXAMPLES = 60


def train_arm(
    settings: RunSettings,
    arm: str,
    output: Path,
    cache_folder: Path,
    reporter: ProgressReporter,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> dict | None:
    """Trains one arm through all stages, evaluates it and saves model and processor.

    Args:
        settings: what to train.
        arm: `"moe"` or `"dense"`.
        output: stages, `model/` and `evaluation.json` are written to the folder `arm` in it, and
            what all arms share to `base`.
        cache_folder: where the encoders' features are kept.
        reporter: is told of the progress.
        device: where to train.
        mesh: of the processes that train together, which all call this; None is this one alone.
            The first of them evaluates and writes, after the process groups have ended.

    Returns:
        What `evaluation.json` holds: `accuracy` and `answers` by task, `routing` shares (MoE), and
        `seconds`. None in processes other than the first.
    """
    ranks = Ranks(mesh)
    folder = output / arm
    run = fingerprint([arm, settings.result_facts(), settings.resolved_precision(device)])
    if (result := _finished(folder, run)) is not None:
        finish_parallel()
        return result if ranks.is_first else None
    builder = build_tasks(settings, cache_folder, device)
    # The first process fills the cache of features that the others read.
    if not ranks.is_first:
        ranks.wait("features")
    tasks = builder.media_examples("train") | builder.text_examples()
    if ranks.is_first:
        ranks.wait("features")
    trainer = build_trainer(settings, arm, output, tasks, builder.bank, reporter, device, mesh)
    model = trainer.run()
    finish_parallel()
    if not ranks.is_first:
        return None
    tokenizer = trainer.tokenizer
    model.save_pretrained(folder / "model")
    UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folder / "model")
    result = {"run": run, **_evaluate(settings, model, trainer, builder, reporter)}
    write_whole(folder / "evaluation.json", json.dumps(result))
    return result


def build_trainer(
    settings: RunSettings,
    arm: str,
    output: Path,
    tasks: Mapping[str, Sequence[Example]],
    bank: MediaBank,
    reporter: ProgressReporter,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> Trainer:
    """The trainer of an arm, with the tokenizer that the settings name or one trained on `tasks`.

    Args:
        settings: what to train.
        arm: `"moe"` or `"dense"`.
        output: see `train_arm`.
        tasks: training examples by task.
        bank: features of their media.
        reporter: is told of the progress.
        device: where to train.
        mesh: see `train_arm`.
    """
    if settings.language_model is None:
        tokenizer = train_on_examples(tasks, settings.model.vocab_size)
    else:
        tokenizer = load_tokenizer(Path(settings.language_model))
    return Trainer(
        settings,
        arm,
        output / arm,
        output / "base",
        tasks,
        bank,
        tokenizer,
        load_decoder(),
        reporter,
        device,
        mesh,
    )


def _finished(folder: Path, run: str) -> dict | None:
    path = folder / "evaluation.json"
    if not path.exists() or not (folder / "model" / "config.json").exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("run") == run else None


def _evaluate(settings: RunSettings, model, trainer: Trainer, builder, reporter) -> dict:
    started = time.monotonic()
    held_out = held_out_examples(settings, builder)
    tokenizer = trainer.tokenizer
    sources = {ref.source for examples in held_out.values() for e in examples for ref in e.media}
    bank = trainer.query_states(model, sources)
    collator = Collator(tokenizer, model.config, bank, query_states=CACHED_KINDS)
    reporter.start("evaluate", sum(map(len, held_out.values())), 0)
    answers = {
        name: generate_answers(model, tokenizer, collator, examples, on_batch=reporter.advance)
        for name, examples in held_out.items()
    }
    reporter.finish()
    routing = {}
    if model.config.num_experts:
        routed = [e for examples in held_out.values() for e in examples[:ROUTED_EXAMPLES]]
        shares = routing_shares(model, collator, routed)
        routing = {modality: share.tolist() for modality, share in shares.items()}
    return {
        "accuracy": {name: accuracy(answers[name], held_out[name]) for name in held_out},
        "answers": answers,
        "routing": routing,
        "seconds": time.monotonic() - started,
    }
