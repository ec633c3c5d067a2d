"""A small and real Uni-MoE on SmolLM2-135M-Instruct: data, training, held-out questions.

Example:
    python -m examples.smol.run --output runs/smol

One seed gives one model; `--arm dense` trains the dense one of the same active FLOPs. A run that
was stopped goes on from where it was.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from examples.demo.baseline import blind_accuracy, exact_accuracy
from examples.demo.exit_code import exit_code_of
from examples.demo.machine import Machine
from examples.demo.parts import keep_memory, open_run
from examples.smol.data import Examples, counts, write_data
from examples.smol.debian import unpack_packages
from examples.smol.language_model import FFN_WIDTH, write_language_model
from examples.smol.settings import ARMS, DENSE_WIDTH, write_recipe
from examples.smol.sizes import QUICK, Sizes
from unimoe_kernels import atomic_write
from unimoe_model.folder_lock import FolderLock
from unimoe_model.training.progress import ProgressReporter, own_reporter

LEARNED_FROM = {
    "drawing": "picture",
    "stamp": "picture",
    "digit": "word",
    "human_word": "word",
    "new_instruction": "instruction",
}
"""Training task that a held-out one asks about, where it has another name."""


def run_smol(output: Path, arm: str, seed: int, quick: bool = False) -> dict[str, dict]:
    """Prepares, trains and evaluates; what an earlier run has finished is not done again.

    Args:
        output: folder of data, features and runs.
        arm: `"moe"` or `"dense"`.
        seed: of the weights that are drawn and of the data's order.
        quick: goes the whole way on little data.

    Returns:
        Of each held-out task its items, and the accuracy of the model and of the blind baseline.

    Raises:
        ValueError: If the output holds other data.
        MissingAssetError: If a package of weights or data is not installed.
        OSError: If a file cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(Machine.detect(device, processes=1), flush=True)
    reporter = own_reporter()
    print("1/3  Language model and data", flush=True)
    examples = prepare(output, arm, Sizes() if not quick else QUICK, reporter)
    print(counts(examples), flush=True)
    recipe = write_recipe(output, arm, seed, quick)
    print("2/3  Features of the frozen encoders, training, held-out questions", flush=True)
    keep_memory()
    own = recipe.with_suffix("")
    with FolderLock(own):
        found, run = open_run(recipe, seed, output / "features", reporter)
        names = [stage.name for stage in found.stages]
        run.train(names)
        run.evaluate(names[-1:])
        run.publish(names[-1])
    print("3/3  Results", flush=True)
    answers = run.folder(names[-1]) / "eval"
    results = collect(answers, [own.name for own in found.evaluations], examples)
    with atomic_write(own / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))
    return results


def prepare(output: Path, arm: str, sizes: Sizes, reporter: ProgressReporter) -> Examples:
    """Writes the language model of an arm and the data, as far as they are missing."""
    debian = output / "debian"
    unpack_packages(debian, reporter)
    language_model = output / "language_model"
    write_language_model(language_model, FFN_WIDTH)
    if arm == "dense":
        write_language_model(output / f"language_model-{DENSE_WIDTH}", DENSE_WIDTH)
    return write_data(output / "data", debian, language_model, sizes, reporter)


def collect(answers: Path, tasks: Sequence[str], examples: Examples) -> dict[str, dict]:
    """Accuracy of held-out tasks.

    Args:
        answers: folder of the evaluations of a stage.
        tasks: which of them.
        examples: what was asked, and what was learned.
    """
    found = {}
    for task in tasks:
        asked = examples["test"][task]
        learned = examples["train"][LEARNED_FROM.get(task, task)]
        found[task] = {
            "items": len(asked),
            "accuracy": exact_accuracy(answers / task, asked),
            "blind": blind_accuracy(learned, asked),
        }
    return found


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The results as lines."""
    lines = [f"{'task':<16}{'items':>6}{'model':>9}{'blind':>9}"]
    for task, own in results.items():
        shares = [f"{100 * own[name]:.1f} %" for name in ("accuracy", "blind")]
        lines.append(f"{task:<16}{own['items']:>6}{shares[0]:>9}{shares[1]:>9}")
    return "\n".join(lines)


def main() -> int:
    """Runs as the command line says; errors of the user are one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smol"), help="default runs/smol")
    parser.add_argument("--arm", choices=ARMS, default="moe", help="default moe")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--quick", action="store_true", help="the whole way, too short to learn much"
    )
    options = parser.parse_args()
    return exit_code_of(
        "smol", lambda: run_smol(options.output, options.arm, options.seed, options.quick)
    )


if __name__ == "__main__":
    sys.exit(main())
