"""The demo: trains the MoE and the dense model side by side, and reports the results.

Example:
    python -m examples.demo.run --output runs/demo
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from examples.demo.baseline import blind_accuracy, exact_accuracy
from examples.demo.data import write_data
from examples.demo.exit_code import exit_code_of
from examples.demo.forecast import Forecast, forecast
from examples.demo.machine import Machine
from examples.demo.parts import (
    EVALUATION,
    FEATURES,
    open_run,
    run_parts,
    train_shared,
)
from examples.demo.report import Results, print_results, write_report
from examples.demo.routing import routed
from examples.demo.settings import (
    ARMS,
    TASKS,
    VARIANTS,
    Variant,
    fill_in_aligned,
    write_recipes,
)
from examples.demo.showcase import show_examples
from examples.demo.throughput import layer_throughput
from unimoe_kernels import atomic_write
from unimoe_model.training.freed_memory import keep_freed_memory
from unimoe_model.training.progress import BarReporter
from unimoe_model.training.recipe import load_recipe

THROUGHPUT_LAYER = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_experts": 4,
    "top_k": 2,
    "tokens": 512,
}
FORECAST = "forecast.json"


def run_demo(
    variant: Variant, seed: int, output: Path, features: Path | None = None, target=None
) -> Results:
    """Trains, evaluates and reports, skipping what an earlier run has completed.

    Args:
        variant: length of the run.
        seed: seed of weights, data order and held-out items.
        output: output folder.
        features: folder of features; None for `output/features`.
        target: function that the training processes run; see `run_parts`.

    Returns:
        The contents of `metrics.json`.

    Raises:
        RuntimeError: If a training process fails, with its message.
    """
    features = features or output / "features"
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine.detect(device, processes=len(ARMS))
    print(machine, flush=True)
    recipes = write_recipes(output, variant)

    print(
        "1/4  Data, features of the frozen encoders, and stage 1, which both models share",
        flush=True,
    )
    data = output / "data"
    examples = write_data(
        data, seed, variant.limits, BarReporter(), variant.held_out, variant.is_full
    )
    expected = (
        forecast(recipes["moe"], seed, output, machine) if variant.is_forecast else Forecast({})
    )
    if expected.seconds:
        print(f"This will take {expected}", flush=True)
    if not (output / FORECAST).exists():
        _write_json(output / FORECAST, expected.seconds)
    keep_freed_memory()
    torch.set_num_threads(machine.cores)
    run = train_shared(recipes["moe"], seed, features, BarReporter(prefix=" base "))
    if not variant.is_full:
        fill_in_aligned(recipes["dense"], run.folder("align") / "model")

    print("2/4  Training: the MoE and, on the same batches, the dense baseline", flush=True)
    run_parts(recipes, seed, features, machine.threads, target)
    runs = {"moe": run, "dense": open_run(recipes["dense"], seed, features, BarReporter())[1]}

    print("3/4  Speed of one MoE layer beside the dense and the looped one", flush=True)
    throughput = layer_throughput(**THROUGHPUT_LAYER, device=device, dtype=torch.float32)

    print("4/4  Report", flush=True)
    recipe, held_out, train = load_recipe(recipes["moe"]), examples["test"], examples["train"]
    accuracy = {
        arm: {
            task: exact_accuracy(own.folder("tune") / "eval" / task, held_out[task])
            for task in TASKS
        }
        for arm, own in runs.items()
    }
    shares, tokens = routed(run, held_out)
    losses, seconds = _stage_metrics(runs, recipe.stages[0].name if variant.is_full else "align")
    results = Results(
        accuracy=accuracy["moe"],
        blind={task: blind_accuracy(train[task], held_out[task]) for task in TASKS},
        dense=accuracy["dense"],
        items={task: len(held_out[task]) for task in TASKS},
        seconds={name: round(value, 1) for name, value in seconds.items()},
        throughput=throughput,
        throughput_layer=THROUGHPUT_LAYER,
        losses=losses,
        routing=shares,
        routed_tokens=tokens,
        top_k=recipe.stage("tune").assembly.top_k,
        experts=list(recipe.stage("tune").assembly.experts),
        seed=seed,
        machine=asdict(machine),
        forecast=_read_json(output / FORECAST),
    )
    _link(output / "final", output / "moe" / "model")
    shown = show_examples(output / "moe" / "model", output / "examples", held_out)
    write_report(results, shown, output)
    print_results(results, shown, output)
    return results


def _stage_metrics(runs: dict, shared: str) -> tuple[dict, dict[str, float]]:
    """Losses and seconds of every stage; the shared stage is taken from `base`."""
    losses: dict[str, dict[str, list[float]]] = {"base": {}, **{arm: {} for arm in runs}}
    output = runs["moe"].folder(shared).parents[1]
    seconds = {"features": _read_json(output / FEATURES)["seconds"]}
    for arm, run in runs.items():
        for stage in run.ids:
            owner = "base" if arm == "moe" and stage == "align" == shared else arm
            metrics = _read_json(run.folder(stage) / "metrics.json")
            losses[owner][stage] = metrics["losses"]
            seconds[f"{owner}/{stage}"] = metrics["seconds"]
        seconds[f"{arm}/evaluate"] = _read_json(output.parent / arm / EVALUATION)["seconds"]
    return {arm: own for arm, own in losses.items() if own}, seconds


def _link(link: Path, folder: Path) -> None:
    """Makes `link` a relative symbolic link to a folder beside or below it."""
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(link.parent))


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, facts: dict) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(facts), encoding="utf-8")


def main() -> int:
    """Runs the command; user errors are printed as one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="default runs/demo")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--full", action="store_true", help="all data and more steps; pretrains the LLM"
    )
    which.add_argument(
        "--quick", action="store_true", help="all stages in a few minutes, too short to learn much"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--features", type=Path, help="feature cache; default OUTPUT/features")
    options = parser.parse_args()
    name = "full" if options.full else "quick" if options.quick else "demo"
    if options.quick:
        print("A quick run goes the whole way and is too short to learn much.")
    return exit_code_of(
        "demo",
        lambda: run_demo(VARIANTS[name], options.seed, options.output, options.features),
    )


if __name__ == "__main__":
    sys.exit(main())
