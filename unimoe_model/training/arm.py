"""One arm of a run from data to evaluated checkpoint, callable in a process of its own."""

import json
import os
import threading
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils.logging import disable_progress_bar

from unimoe_kernels.distributed import finish_parallel
from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import EVALUATED_TASKS, Example
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.tasks import Encoders, TaskBuilder
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.encoders import build_encoder
from unimoe_model.encoders.whisper import load_decoder
from unimoe_model.evaluation.accuracy import accuracy, generate_answers, held_out_sample
from unimoe_model.evaluation.routing import routing_shares
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import build_prompt
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.progress import ProgressReporter, QueueReporter
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.settings import RunSettings
from unimoe_model.training.stages import CACHED_KINDS, Trainer, query_state_bank
from unimoe_model.user_errors import USER_ERRORS

TOKENIZER_SAMPLE = 3000
ROUTED_EXAMPLES = 60


def build_tasks(settings: RunSettings, cache_folder: Path, device: torch.device) -> TaskBuilder:
    """The tasks of a run, over the demo's encoders and a cache of their features.

    Vision and speech are encoded in bfloat16 where the run trains in it (3 to 4 times faster on a
    CPU with AVX512-BF16); the small sound network gains nothing.
    """
    bf16 = settings.resolved_precision(device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    encoders = Encoders(
        vision=build_encoder("efficientnet-lite0", "vision").to(device, dtype),
        speech=build_encoder("whisper-tiny.en", "speech").to(device, dtype),
        audio=build_encoder("aisfx", "audio").to(device),
    )
    return TaskBuilder(
        FeatureCache(cache_folder), encoders, settings.model.speech_max_frames, settings.seed
    )


def held_out_examples(
    settings: RunSettings, builder: TaskBuilder, split: str = "test"
) -> dict[str, list[Example]]:
    """The held-out items of the six tasks, sampled as the settings say."""
    tasks = builder.media_examples(split) | {"text": builder.held_out_text(split)}
    return {
        name: held_out_sample(tasks[name], settings.evaluation.get(name), settings.seed)
        for name in EVALUATED_TASKS
    }


def train_arm(
    settings: RunSettings,
    arm: str,
    folder: Path,
    cache_folder: Path,
    reporter: ProgressReporter,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> dict | None:
    """Trains one arm through all stages, evaluates it and saves model and processor.

    Args:
        settings: what to train.
        arm: `"moe"` or `"dense"`.
        folder: stages, `model/` and `evaluation.json` are written here.
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
    tokenizer = train_tokenizer(
        (
            f"{build_prompt(e.question, [ref.kind for ref in e.media])} {e.answer}"
            for examples in tasks.values()
            for e in examples[:TOKENIZER_SAMPLE]
        ),
        settings.model.vocab_size,
    )
    trainer = Trainer(
        settings,
        arm,
        folder,
        tasks,
        builder.bank,
        tokenizer,
        load_decoder(),
        reporter,
        device,
        mesh,
    )
    model = trainer.run()
    finish_parallel()
    if not ranks.is_first:
        return None
    model.save_pretrained(folder / "model")
    UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folder / "model")
    result = {"run": run, **_evaluate(settings, model, tokenizer, builder, reporter)}
    partial = folder / "evaluation.json.new"
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(folder / "evaluation.json")
    return result


def _finished(folder: Path, run: str) -> dict | None:
    path = folder / "evaluation.json"
    if not path.exists() or not (folder / "model" / "config.json").exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("run") == run else None


def _evaluate(settings: RunSettings, model, tokenizer, builder, reporter) -> dict:
    started = time.monotonic()
    held_out = held_out_examples(settings, builder)
    bank = query_state_bank(model, builder.bank)
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


def arm_process(
    settings: RunSettings,
    arm: str,
    folder: Path,
    cache_folder: Path,
    queue,
    device: torch.device,
    threads: int,
) -> None:
    """Body of a process that trains one arm and sends its progress, or its error, to `queue`."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    _exit_with_parent()
    try:
        train_arm(settings, arm, folder, cache_folder, QueueReporter(arm, queue), device)
    except KeyboardInterrupt:
        return
    except USER_ERRORS as error:
        queue.put((arm, "failed", (str(error),), {}))
        return
    except Exception as error:
        queue.put((arm, "failed", (f"{type(error).__name__}: {error}",), {}))
        raise
    queue.put((arm, "done", (), {}))


def _exit_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
