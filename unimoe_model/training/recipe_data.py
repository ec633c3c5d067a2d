"""The data of a recipe, checked before any weights are loaded."""

from collections.abc import Iterator
from pathlib import Path

from unimoe_model.data.conversations import Conversations, read_conversations
from unimoe_model.data.indexed_files import Media
from unimoe_model.data.media_items import require_readers
from unimoe_model.data.shards import read_shards
from unimoe_model.data.windows import Shuffle
from unimoe_model.evaluation.samples import Sample, asked_media
from unimoe_model.evaluation.scoring import scored_samples
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.recipe import DataFile, Recipe
from unimoe_model.training.recipe.shard_names import shard_files, shard_paths


class RecipeData:
    """All data of a recipe.

    Args:
        recipe: the recipe.
        missing: list that missing files are appended to; their data are then empty. None raises an
            error for missing files.
        reporter: shows progress for long files.

    Attributes:
        samples: conversations by data name.
        shuffles: windows of data that are shuffled in windows, by data name.
        held_out: questions by evaluation name.

    Raises:
        ValueError: If a file is missing, has an invalid format or cannot be scored, or media are
            missing.
        ModuleNotFoundError: If a package that reads media or computes a metric is not installed.
    """

    def __init__(
        self,
        recipe: Recipe,
        missing: list[str] | None = None,
        reporter: ProgressReporter | None = None,
    ):
        self.samples: dict[str, Conversations] = {}
        places = [
            *((f"data.{n}.file", Path(f.file), False) for n, f in recipe.data.items() if f.file),
            *((f"data.{n}.media", Path(f.media), True) for n, f in recipe.data.items() if f.media),
            *((f"evaluate.{e.name}.data", Path(e.data), False) for e in recipe.evaluations),
        ]
        absent = [
            f"{key} ({path}) must be a {'folder' if is_folder else 'file'}; there is none"
            for key, path, is_folder in places
            if not (path.is_dir() if is_folder else path.is_file())
        ]
        absent += [
            f"data.{name}.shards ({pattern}) must be a file; there is none"
            for name, file in recipe.data.items()
            for pattern in file.shards
            if not shard_files(pattern)
        ]
        if absent and missing is None:
            raise ValueError(f"{recipe.path}: {absent[0]}")
        if missing is not None:
            missing += absent
        for name, file in recipe.data.items():
            if any(line.startswith(f"data.{name}.") for line in absent):
                self.samples[name] = Conversations([].__getitem__, (), {}, "")
                continue
            try:
                self.samples[name] = _read(file, reporter)
            except ValueError as error:
                raise ValueError(f"{recipe.path}: data.{name}: {error}") from error
        self._require_texts(recipe)
        self.shuffles = {
            name: Shuffle(file.shuffle, self.samples[name].parts)
            for name, file in recipe.data.items()
            if file.shuffle is not None
        }
        self.held_out: dict[str, list[Sample]] = {}
        for e in recipe.evaluations:
            if not any(line.startswith(f"evaluate.{e.name}.") for line in absent):
                try:
                    lines = scored_samples(Path(e.data), e.metric, e.limit)
                except ValueError as error:
                    raise ValueError(f"{recipe.path}: evaluate.{e.name}: {error}") from error
                self.held_out[e.name] = lines[: e.limit]
        asked = (asked_media(one) for questions in self.held_out.values() for one in questions)
        held = {kind for media in asked for kind, _ in media}
        require_readers(held.union(*self.kinds.values()))

    def _require_texts(self, recipe: Recipe) -> None:
        for stage in recipe.stages:
            for name in stage.distill:
                if self.kinds[name]:
                    raise ValueError(
                        f"{recipe.path}: stages.{stage.name}.distill ({name}) must be data without"
                        f" media; {name} has {', '.join(sorted(self.kinds[name]))}"
                    )

    @property
    def kinds(self) -> dict[str, dict[str, int]]:
        """Number of media items by data name and kind."""
        return {name: samples.kinds for name, samples in self.samples.items()}

    @property
    def digests(self) -> dict[str, str]:
        """Hashes of the samples and the sizes of their media, by data name."""
        return {name: samples.digest for name, samples in self.samples.items()}

    def media(self) -> Iterator[tuple[str, Media]]:
        """Yields kind and location of all media, those of held-out questions last."""
        for samples in self.samples.values():
            for sample in samples:
                yield from sample.media
        for questions in self.held_out.values():
            for question in questions:
                yield from asked_media(question)

    def counts(self) -> dict[str, int]:
        """Number of samples by data name."""
        return {name: len(samples) for name, samples in self.samples.items()}

    def texts(self) -> Iterator[str]:
        """Yields the texts of all samples, to train a tokenizer on."""
        for samples in self.samples.values():
            for sample in samples:
                for user, answer in sample.turns:
                    yield f"USER: {user} ASSISTANT: {answer}"


def _read(file: DataFile, reporter: ProgressReporter | None) -> Conversations:
    if file.shards:
        return read_shards(shard_paths(file.shards), reporter)
    return read_conversations(Path(file.file), file.media and Path(file.media), reporter)
