"""`unimoe demo`: trains the MoE and the dense model side by side, and shows what came out."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.multiprocessing as mp
from transformers.utils.logging import disable_progress_bar

from unimoe_model.data.examples import EVALUATED_TASKS
from unimoe_model.evaluation.accuracy import accuracy, blind_answers
from unimoe_model.evaluation.report import Results, print_results, write_report
from unimoe_model.evaluation.showcase import show_examples
from unimoe_model.evaluation.throughput import layer_throughput
from unimoe_model.training.machine import Machine
from unimoe_model.training.parts import FEATURES_SECONDS, FORECAST, run_part
from unimoe_model.training.progress import BarReporter, replay
from unimoe_model.training.run_data import build_tasks, held_out_examples
from unimoe_model.training.settings import RunSettings
from unimoe_model.training.stages import ARMS, STAGES

THROUGHPUT_LAYER = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_experts": 4,
    "top_k": 2,
    "tokens": 512,
}


def run_demo(settings: RunSettings, output: Path, cache_folder: Path | None = None) -> Results:
    """Trains, evaluates, shows and reports; what an earlier run has finished is not done again.

    Args:
        settings: what to train.
        output: folder of everything that is written.
        cache_folder: where features are kept; `output/features` if None.

    Returns:
        The figures of `metrics.json`.

    Raises:
        RuntimeError: If a training process fails, as where `output` holds a run of another
            configuration; its message is passed on.
    """
    cache_folder = cache_folder or output / "features"
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine.detect(settings, device, processes=len(ARMS))
    print(machine, flush=True)
    print("1/4  Features of the frozen encoders, and stage 1, which both models share", flush=True)
    _run_parts(settings, ("base",), output, cache_folder, device, machine.cores)

    print("2/4  Training: the MoE and, on the same batches, the dense baseline", flush=True)
    _run_parts(settings, ARMS, output, cache_folder, device, machine.threads)
    evaluations = {arm: _read_json(output / arm / "evaluation.json") for arm in ARMS}
    builder = build_tasks(settings, cache_folder, device)
    train = builder.media_examples("train") | builder.text_examples()
    held_out = held_out_examples(settings, builder)
    seconds = {"features": _read_json(output / "base" / FEATURES_SECONDS)["seconds"]}

    print("3/4  Speed of one MoE layer beside the dense and the looped one", flush=True)
    throughput = layer_throughput(**THROUGHPUT_LAYER, device=device, dtype=torch.float32)

    print("4/4  Report", flush=True)
    blind = {
        task: accuracy(blind_answers(train[task], held_out[task]), held_out[task])
        for task in EVALUATED_TASKS
    }
    losses, stage_seconds = _stage_metrics(output)
    seconds |= stage_seconds
    seconds["evaluate"] = sum(e["seconds"] for e in evaluations.values())
    results = Results(
        accuracy=evaluations["moe"]["accuracy"],
        blind=blind,
        dense=evaluations["dense"]["accuracy"],
        items={task: len(held_out[task]) for task in EVALUATED_TASKS},
        seconds={name: round(value, 1) for name, value in seconds.items()},
        throughput=throughput,
        throughput_layer=THROUGHPUT_LAYER,
        losses=losses,
        routing={k: torch.tensor(v) for k, v in evaluations["moe"]["routing"].items()},
        experts=list(settings.experts),
        seed=settings.seed,
        machine=asdict(machine),
        forecast=_read_json(output / FORECAST),
    )
    _link(output / "final", output / "moe" / "model")
    examples = show_examples(output / "moe" / "model", output / "examples", held_out)
    write_report(results, examples, output)
    print_results(results, examples, output)
    return results


def _link(link: Path, folder: Path) -> None:
    """Makes `link` lead to a folder beside or below it."""
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(link.parent))


def _run_parts(
    settings: RunSettings,
    parts: Sequence[str],
    output: Path,
    cache_folder: Path,
    device: torch.device,
    threads: int,
) -> None:
    """Runs parts of the demo side by side, each in a process with so many threads."""
    # The processes' steps allocate the same sizes again and again: with these, glibc keeps the
    # memory instead of handing it back and faulting every page in anew.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 34))
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = {
        part: context.Process(
            target=run_part,
            args=(settings, part, output, cache_folder, queue, device, threads),
            daemon=True,
        )
        for part in parts
    }
    reporters = {
        part: BarReporter(prefix=f"{part:>5} ", position=i) for i, part in enumerate(parts)
    }
    for process in processes.values():
        process.start()
    running = set(processes)
    try:
        while running:
            if queue.empty():
                _check_alive(processes, running)
                time.sleep(0.1)
                continue
            message = queue.get()
            if message[1] == "done":
                running.remove(message[0])
            elif message[1] == "failed":
                raise RuntimeError(f"training of {message[0]} failed: {message[2][0]}")
            else:
                replay(message, reporters)
    finally:
        for process in processes.values():
            if running:
                process.terminate()
            process.join()


def _check_alive(processes: dict, running: set[str]) -> None:
    for arm in running:
        code = processes[arm].exitcode
        if code not in (None, 0):
            raise RuntimeError(f"training of {arm} ended with exit code {code}")


def _stage_metrics(output: Path) -> tuple[dict, dict[str, float]]:
    losses: dict[str, dict[str, list[float]]] = {part: {} for part in ("base", *ARMS)}
    seconds: dict[str, float] = {}
    for arm in losses:
        for path in sorted(
            (output / arm).rglob("metrics.json"), key=lambda p: _stage_order(p, output / arm)
        ):
            stage = path.parent.relative_to(output / arm).as_posix()
            metrics = _read_json(path)
            losses[arm][stage] = metrics["losses"]
            seconds[f"{arm}/{stage}"] = metrics["seconds"]
    return losses, seconds


def _stage_order(path: Path, folder: Path) -> tuple[int, str]:
    stage = path.relative_to(folder)
    return STAGES.index(stage.parts[0]), stage.as_posix()


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
