"""The study of the paper's claims on the demo's data: writes the data and runs the grid.

Example:
    python -m examples.study.run --output runs/study
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from examples.demo.data import write_data, write_text
from examples.demo.exit_code import exit_code_of
from examples.demo.limits import DataLimits
from unimoe_model.cli_options import integers
from unimoe_model.study.command import run_study
from unimoe_model.training.freed_memory import keep_freed_memory
from unimoe_model.training.progress import own_reporter

HERE = Path(__file__).parent
LANGUAGE_MODEL = HERE.parent / "demo" / "language_model"
LIMITS = DataLimits(pictures=1200, words=900, questions=600, sounds=960, videos=800)
HELD_OUT = {
    "image_qa": 1000,
    "spoken_word": 300,
    "spoken_question": 300,
    "sound": 400,
    "video": 300,
    "text": 300,
}
QUICK_LIMITS = DataLimits(pictures=60, words=60, questions=40, sounds=60, videos=40)
QUICK_ITEMS, QUICK_STEPS, QUICK_SEEDS = 12, 24, 2


def prepare(output: Path, quick: bool) -> Path:
    """Writes data, recipe and study into a folder; what is there already stays.

    Args:
        output: the folder.
        quick: takes little data, few steps and two seeds.

    Returns:
        The file of the study.

    Raises:
        ValueError: If the folder holds data of the other kind.
    """
    limits = QUICK_LIMITS if quick else LIMITS
    held_out = dict.fromkeys(HELD_OUT, QUICK_ITEMS) if quick else HELD_OUT
    write_data(output / "data", 0, limits, own_reporter(), held_out, for_pretraining=False)
    recipe, study = _read("recipe.yaml"), _read("study.yaml")
    recipe["model"] = str(LANGUAGE_MODEL)
    if quick:
        for stage in recipe["stages"]:
            stage["steps"] = QUICK_STEPS
        study["seeds"] = QUICK_SEEDS
        for arm in study["arms"].values():
            arm.pop("seeds", None)
        del study["metrics"], study["page"]
    else:
        study |= {key: str((HERE / study[key]).resolve()) for key in ("metrics", "page")}
    _write(output / "recipe.yaml", recipe)
    _write(output / "study.yaml", study)
    return output / "study.yaml"


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True))


def main() -> int:
    """Runs as the command line says; errors of the user are one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=integers, metavar="N,...", help="train these alone")
    parser.add_argument("--quick", action="store_true", help="the whole way on little data")
    parser.add_argument("--check", action="store_true", help="list the runs, and stop")
    options = parser.parse_args()

    def run() -> None:
        study = prepare(options.output, options.quick)
        keep_freed_memory()
        run_study(study, options.output, options.seeds, options.check)

    return exit_code_of("study", run)


if __name__ == "__main__":
    sys.exit(main())
