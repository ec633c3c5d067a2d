"""What a run measured: accuracy of held-out tasks beside that of blind, start and probes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.demo.baseline import blind_accuracy, exact_accuracy
from examples.demo.example import Example
from examples.smol.data import Examples
from examples.smol.ranking import likeliest_names
from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.evaluation.scoring import evaluate_file
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.recipe import Evaluation

LEARNED_FROM = {
    "drawing": "picture",
    "stamp": "picture",
    "digit": "word",
    "human_word": "word",
    "new_instruction": "instruction",
}
"""Training task that a held-out one asks about, where it has another name."""
PROBED = (
    "drawing",
    "stamp",
    "kind",
    "word",
    "digit",
    "human_word",
    "instruction",
    "family",
    "sound",
)
"""Tasks about one item, whose answers a linear probe can learn."""
RANKED = ("drawing", "stamp")
"""Tasks whose right name is looked for among the likeliest of all names."""
START_ITEMS = 40
"""Questions of each task that the untrained model is asked."""
TOP = 5
_PICTURES = {"image": "images", "speech": "speech", "audio": "audio"}

Features = Callable[[str, Path], EncodedMedia]


def accuracies(
    answers: Path, tasks: Sequence[str], examples: Examples, limit: int | None = None
) -> dict[str, dict]:
    """Accuracy of held-out tasks.

    Args:
        answers: folder of the evaluations of a model.
        tasks: which of them.
        examples: what was asked, and what was learned.
        limit: only the first so many were asked.
    """
    found = {}
    for task in tasks:
        asked = examples["test"][task][:limit]
        learned = examples["train"][LEARNED_FROM.get(task, task)]
        found[task] = {
            "items": len(asked),
            "accuracy": exact_accuracy(answers / task, asked),
            "blind": blind_accuracy(learned, asked),
        }
    return found


def ask_start(
    model: Path,
    evaluations: Sequence[Evaluation],
    output: Path,
    features: Features,
    reporter: ProgressReporter,
) -> None:
    """Asks the untrained model the first questions of each task.

    Args:
        model: its folder.
        evaluations: of the recipe.
        output: gets a folder for each evaluation.
        features: of media files.
        reporter: shows the progress.
    """
    for own in evaluations:
        evaluate_file(
            model,
            Path(own.data),
            own.metric,
            output / own.name,
            own.max_new_tokens,
            START_ITEMS,
            reporter,
            START_ITEMS,
            features,
        )


def top_shares(
    model: UniMoEForConditionalGeneration,
    processor: UniMoEProcessor,
    features: Features,
    examples: Examples,
    tasks: Sequence[str] = RANKED,
) -> dict[str, float]:
    """How often the right name is among the likeliest five of all names that were learned."""
    shares = {}
    for task in tasks:
        asked = examples["test"].get(task)
        if not asked:
            continue
        learned = examples["train"][LEARNED_FROM.get(task, task)]
        names = sorted({example.answer for example in learned})
        rows = [
            processor.question_row(example.question, **_media(example, features))
            for example in asked
        ]
        found = likeliest_names(model, processor, rows, names, min(TOP, len(names)))
        pairs = zip(found, asked, strict=True)
        shares[task] = sum(example.answer in own for own, example in pairs) / len(asked)
    return shares


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The results as lines; what was not measured is a dash."""
    columns = ("accuracy", "start", "blind", "probe", "top5", "probe_top5")
    heads = ("model", "start", "blind", "probe", "top 5", "probe's")
    lines = [f"{'task':<16}{'items':>6}" + "".join(f"{head:>9}" for head in heads)]
    for task, own in results.items():
        shares = [f"{100 * own[name]:.1f} %" if name in own else "-" for name in columns]
        lines.append(f"{task:<16}{own['items']:>6}" + "".join(f"{share:>9}" for share in shares))
    return "\n".join(lines)


def _media(example: Example, features: Features) -> dict[str, list[EncodedMedia]]:
    found: dict[str, list[EncodedMedia]] = {}
    for kind, path in example.media:
        found.setdefault(_PICTURES[kind], []).append(features(kind, path))
    return found
