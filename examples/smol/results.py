"""Results of a run: held-out accuracy of the model, the blind baseline, the start and probes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.demo.baseline import blind_accuracy, exact_accuracy
from examples.demo.example import Example
from examples.smol.data import Examples
from examples.smol.ranking import likeliest_names
from unimoe_model.data.encoded_media import EncodedMedia, Row
from unimoe_model.evaluation.scoring import evaluate_file
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.features import MediaFeatures
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.recipe import Evaluation

LEARNED_FROM = {
    "drawing": "picture",
    "stamp": "picture",
    "digit": "word",
    "human_word": "word",
    "new_instruction": "instruction",
}
"""Training task of each held-out task that has another name."""
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
"""Tasks about a single item, whose answers a linear probe can learn."""
RANKED = ("drawing", "stamp")
"""Tasks for which top-5 accuracy over all names is computed."""
START_ITEMS = 20
"""Number of questions per task for the untrained model."""
TOP = 5
_PICTURES = {"image": "images", "speech": "speech", "audio": "audio"}

Features = Callable[[str, Path], EncodedMedia]


def accuracies(
    answers: Path, tasks: Sequence[str], examples: Examples, limit: int | None = None
) -> dict[str, dict]:
    """Returns the accuracy of held-out tasks.

    Args:
        answers: folder of the evaluations of a model.
        tasks: held-out tasks to include.
        examples: test and training examples.
        limit: number of examples of each task that were evaluated, from the first; None for all.
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
    features: MediaFeatures,
    reporter: ProgressReporter,
) -> None:
    """Evaluates the untrained model on the first questions of each task.

    Args:
        model: folder of the model.
        evaluations: evaluations of the recipe.
        output: folder in which each evaluation gets a folder.
        features: features of media files, already computed.
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
            features.item,
            features.identity,
        )


def top_shares(
    model: UniMoEForConditionalGeneration,
    processor: UniMoEProcessor,
    features: Features,
    examples: Examples,
    tasks: Sequence[str] = RANKED,
) -> dict[str, float]:
    """Returns how often the right name is among the five likeliest of all trained names."""
    shares = {}
    for task in tasks:
        asked = examples["test"].get(task)
        if not asked:
            continue
        learned = examples["train"][LEARNED_FROM.get(task, task)]
        names = sorted({example.answer for example in learned})
        rows = [question_row(example, processor, features) for example in asked]
        found = likeliest_names(model, processor, rows, names, min(TOP, len(names)))
        pairs = zip(found, asked, strict=True)
        shares[task] = sum(example.answer in own for own, example in pairs) / len(asked)
    return shares


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the results as lines; values that were not measured are dashes."""
    columns = ("accuracy", "start", "blind", "probe", "top5", "probe_top5")
    heads = ("model", "start", "blind", "probe", "top 5", "probe's")
    lines = [f"{'task':<16}{'items':>6}" + "".join(f"{head:>9}" for head in heads)]
    for task, own in results.items():
        shares = [f"{100 * own[name]:.1f} %" if name in own else "-" for name in columns]
        lines.append(f"{task:<16}{own['items']:>6}" + "".join(f"{share:>9}" for share in shares))
    return "\n".join(lines)


def question_row(example: Example, processor: UniMoEProcessor, features: Features) -> Row:
    """Returns the prompt of an example's question with its media."""
    media: dict[str, list[EncodedMedia]] = {}
    for kind, path in example.media:
        media.setdefault(_PICTURES[kind], []).append(features(kind, path))
    return processor.question_row(example.question, **media)
