"""A small and real Uni-MoE on SmolLM2-135M-Instruct: data, training, held-out questions.

Example:
    python -m examples.smol.run --output runs/smol

The model is determined by the seed. `--arm dense` trains the dense model with the same active
FLOPs. Arms with the same seed share the stages that they have in common. A run that was stopped is
resumed.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.demo.exit_code import exit_code_of
from examples.demo.machine import Machine
from examples.demo.parts import open_run
from examples.smol.cached import cached
from examples.smol.data import Examples, counts, write_data
from examples.smol.debian import unpack_packages
from examples.smol.expert_use import ASKED as EXPERT_ITEMS
from examples.smol.expert_use import expert_use, use_lines
from examples.smol.language_model import write_language_model
from examples.smol.probe import probe_tasks
from examples.smol.reply_speed import ASKED, fresh_reply_speed, reply_line
from examples.smol.report import Report, shown_examples, write_report
from examples.smol.results import (
    LEARNED_FROM,
    PROBED,
    RANKED,
    START_ITEMS,
    accuracies,
    ask_start,
    question_row,
    table,
    top_shares,
)
from examples.smol.settings import ARMS, arm_recipe, write_recipe
from examples.smol.sizes import QUICK, Sizes
from examples.smol.speed import forecast, training_speed
from examples.smol.text_kept import CHAT_PROMPTS, text_kept, text_lines
from unimoe_kernels import atomic_write, replace_folder
from unimoe_model.folder_lock import FolderLock
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.precision import resolve_precision
from unimoe_model.study.machine import source_commit
from unimoe_model.training.freed_memory import keep_freed_memory
from unimoe_model.training.progress import ProgressReporter, own_reporter
from unimoe_model.training.recipe import Recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run
from unimoe_model.training.starting_model import build_start, describe_start, load_whole

ENCODERS = "examples/smol/encoders.yaml"


def run_smol(
    output: Path, arm: str, seed: int, quick: bool = False, all_steps: bool = False
) -> dict[str, Any]:
    """Prepares, trains, evaluates and reports; steps that an earlier run has finished are skipped.

    Args:
        output: folder of data, features and runs.
        arm: one of `ARMS`.
        seed: seed of the initial weights and of the order of the data.
        quick: whether to run everything on little data.
        all_steps: whether to train for all steps of the recipe, also on a slow machine.

    Returns:
        `"tasks"`: for each held-out task the number of items, and the accuracy of the model, the
        blind baseline, the untrained model and a linear probe; `"text"`: see `text_kept`;
        `"experts"`: names of the experts, and `"routing"`: see `expert_use`, of MoE arms;
        `"reply"`: see `reply_speed`; `"stages"`: seconds, tokens and losses of each stage; and
        `"arm"`, `"seed"`, `"machine"` and `"commit"`.

    Raises:
        ValueError: If `output` contains other data.
        MissingAssetError: If a package of weights or data is not installed.
        OSError: If a file cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine.detect(device, processes=1)
    print(machine, flush=True)
    reporter = own_reporter()
    print("1/4  Language model and data", flush=True)
    examples = prepare(output, Sizes() if not quick else QUICK, reporter)
    print(counts(examples), flush=True)
    keep_freed_memory()
    share = 1.0
    if not quick:
        speed = training_speed(output / "language_model", output / "speed.json")
        precision = resolve_precision("auto", device)
        expected = forecast(arm_recipe(arm), speed, precision, all_steps)
        share = expected.share
        print(expected, flush=True)
    recipe = write_recipe(output, arm, seed, quick, share)
    print("2/4  Features of the frozen encoders, training", flush=True)
    own, shared = recipe.with_suffix(""), output / f"seed-{seed}"
    with FolderLock(shared):
        found, run = open_run(recipe, seed, output / "features", reporter, shared)
        names = [stage.name for stage in found.stages]
        run.train(names)
        own.mkdir(exist_ok=True)
        run.publish(names[-1], own)
        print("3/4  Held-out questions", flush=True)
        results = {"arm": arm, "seed": seed, "machine": str(machine), "commit": source_commit()}
        results |= measure(found, run, output, examples, reporter)
    with atomic_write(own / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    print("4/4  Report", flush=True)
    report = _report(arm, seed, str(machine), run, results, examples, output)
    print(f"\n{report.table}\n\n{report.text}\n")
    if report.routing:
        print(f"{report.routing}\n")
    print(f"{report.reply}\n")
    print(f"Everything is in {own}; open {write_report(report, own)} in a browser.")
    print(f"Talk to it: unimoe chat --model {own / 'model'} --encoders {ENCODERS}")
    return results


def prepare(output: Path, sizes: Sizes, reporter: ProgressReporter) -> Examples:
    """Writes the language model and the data, unless they exist, and returns examples."""
    debian = output / "debian"
    unpack_packages(debian, reporter)
    language_model = output / "language_model"
    write_language_model(language_model)
    return write_data(output / "data", debian, language_model, sizes, reporter)


def measure(
    recipe: Recipe, run: Run, output: Path, examples: Examples, reporter: ProgressReporter
) -> dict[str, Any]:
    """Evaluates the model of the last stage and the baselines on the held-out questions.

    Args:
        recipe: recipe of the run.
        run: run whose stages are finished.
        output: folder of the data and of the language model.
        examples: examples of the data.
        reporter: shows the progress.

    Returns:
        See `run_smol`.
    """
    last = [stage.name for stage in recipe.stages][-1]
    folder = run.folder(last)
    run.evaluate([last])
    tasks = accuracies(folder / "eval", [own.name for own in recipe.evaluations], examples)
    start = _start_folder(recipe, output)
    asked = output / "start" / "eval"
    ask_start(start, recipe.evaluations, asked, run.features, reporter)
    for task, own in accuracies(asked, list(tasks), examples, START_ITEMS).items():
        tasks[task]["start"] = own["accuracy"]
    learned = {task: LEARNED_FROM.get(task, task) for task in PROBED if task in tasks}
    probes = cached(output / "probes.json", lambda: probe_tasks(run.features, examples, learned))
    for task, (first, among) in probes.items():
        tasks[task]["probe"] = first
        if task in RANKED:
            tasks[task]["probe_top5"] = among
    for task, share in cached(
        folder / "top5.json", lambda: _top_shares(run, last, examples)
    ).items():
        tasks[task]["top5"] = share
    texts = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((output / "data" / "text").glob("*.txt"))
    }
    prompts = [example.question for example in examples["test"]["chat"][:CHAT_PROMPTS]]
    text = cached(
        folder / "text.json",
        lambda: text_kept(output / "language_model", folder / "model", texts, prompts),
    )
    shown = [own for task in ("drawing", "image_qa") for own in examples["test"].get(task, ())]
    pictures = [path for example in shown for _, path in example.media]
    reply = cached(
        folder / "reply.json",
        lambda: fresh_reply_speed(folder / "model", recipe, pictures[: ASKED + 1]),
    )
    stages = {}
    for stage in recipe.stages:
        metrics = json.loads((run.folder(stage.name) / "metrics.json").read_text(encoding="utf-8"))
        stages[stage.name] = {key: metrics[key] for key in ("seconds", "tokens")}
        stages[stage.name]["losses"] = [float(f"{loss:.4g}") for loss in metrics["losses"]]
    routing = cached(folder / "routing.json", lambda: _routing(run, last, examples))
    return {"tasks": tasks, "text": text, **routing, "reply": reply, "stages": stages}


def _routing(run: Run, stage: str, examples: Examples) -> dict[str, Any]:
    model = _whole(run, stage)
    if not model.config.num_experts:
        return {}
    asked = [own for held in examples["test"].values() for own in held[:EXPERT_ITEMS]]
    run.features.prepare([item for own in asked for item in own.media])
    rows = [question_row(own, run.processor, run.features.item) for own in asked]
    use = expert_use(model, run.processor, rows)
    return {"experts": model.config.expert_origins, "routing": use}


def _start_folder(recipe: Recipe, output: Path) -> Path:
    """Returns the folder of the untrained model, initialised with the seed of the first run."""
    folder = output / "start" / "model"
    if not folder.exists():
        start = describe_start(recipe, RecipeData(recipe).texts())
        made = folder.with_name(".model.tmp")
        build_start(recipe, start).save_pretrained(made)
        start.processor.save_pretrained(made)
        replace_folder(folder, made)
    return folder


def _top_shares(run: Run, stage: str, examples: Examples) -> dict[str, float]:
    model = _whole(run, stage)
    if resolve_precision("auto", model.device) == "bf16":
        model = model.to(torch.bfloat16)  # two to three times as fast, with the same shares
    return top_shares(model, run.processor, run.features.item, examples)


def _whole(run: Run, stage: str) -> UniMoEForConditionalGeneration:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_whole(run.folder(stage) / "model").to(device).eval()


def _report(
    arm: str,
    seed: int,
    machine: str,
    run: Run,
    results: Mapping[str, Any],
    examples: Examples,
    output: Path,
) -> Report:
    answers = {
        task: _answers(run.folder(list(results["stages"])[-1]) / "eval" / task)
        for task in results["tasks"]
        if task in (*RANKED, "kind")
    }
    stages = results["stages"]
    return Report(
        arm,
        seed,
        machine,
        table(results["tasks"]),
        text_lines(results["text"]),
        reply_line(results["reply"]),
        use_lines(results["routing"], results["experts"]) if "routing" in results else "",
        {name: own["losses"] for name, own in stages.items()},
        {name: own["seconds"] for name, own in stages.items()},
        {name: own["tokens"] for name, own in stages.items()},
        shown_examples(examples, answers, list(answers)) if answers else [],
        sorted(path.name for path in (output / "debian").glob("*")),
    )


def _answers(folder: Path) -> list[str]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def main() -> int:
    """Runs the command line; user errors are printed to stderr as one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smol"), help="default runs/smol")
    parser.add_argument("--arm", choices=ARMS, default="moe", help="default moe")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--quick", action="store_true", help="the whole way, too short to learn much"
    )
    parser.add_argument(
        "--all-steps", action="store_true", help="all steps of the recipe, also on a slow machine"
    )
    options = parser.parse_args()
    return exit_code_of("smol", lambda: run_smol(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
