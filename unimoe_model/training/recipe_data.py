"""The samples that a recipe trains on, read once and checked before anything is loaded."""

from collections.abc import Iterator
from pathlib import Path

from unimoe_model.data.conversations import Conversation, data_digest, read_conversations
from unimoe_model.data.media_items import require_readers
from unimoe_model.evaluation.samples import Sample, asked_media
from unimoe_model.evaluation.scoring import scored_samples
from unimoe_model.training.recipe import Recipe


class RecipeData:
    """All data of a recipe.

    Attributes:
        samples: conversations by the name of their data.
        held_out: questions by the name of their evaluation.
        digests: of each file and its media.

    Args:
        recipe: names the files.
        missing: takes the names of files that are not there, instead of an error; their data are
            empty then.

    Raises:
        ValueError: If a file is missing, is not as `read_conversations` describes or cannot be
            scored, or media are missing.
        ModuleNotFoundError: If a package that reads media or scores answers is not installed.
    """

    def __init__(self, recipe: Recipe, missing: list[str] | None = None):
        self.samples: dict[str, list[Conversation]] = {}
        self.digests: dict[str, str] = {}
        places = [
            *((f"data.{name}.file", Path(file.file), False) for name, file in recipe.data.items()),
            *((f"data.{n}.media", Path(f.media), True) for n, f in recipe.data.items() if f.media),
            *((f"evaluate.{e.name}.data", Path(e.data), False) for e in recipe.evaluations),
        ]
        absent = [
            f"{key} ({path}) must be a {'folder' if is_folder else 'file'}; there is none"
            for key, path, is_folder in places
            if not (path.is_dir() if is_folder else path.is_file())
        ]
        if absent and missing is None:
            raise ValueError(f"{recipe.path}: {absent[0]}")
        if missing is not None:
            missing += absent
        for name, file in recipe.data.items():
            path, media = Path(file.file), file.media and Path(file.media)
            if any(line.startswith(f"data.{name}.") for line in absent):
                self.samples[name] = []
                continue
            try:
                self.samples[name] = read_conversations(path, media)
            except ValueError as error:
                raise ValueError(f"{recipe.path}: data.{name}: {error}") from error
            self.digests[name] = data_digest(path, self.samples[name])
        self.held_out: dict[str, list[Sample]] = {}
        for e in recipe.evaluations:
            if not any(line.startswith(f"evaluate.{e.name}.") for line in absent):
                try:
                    lines = scored_samples(Path(e.data), e.metric, e.limit)
                except ValueError as error:
                    raise ValueError(f"{recipe.path}: evaluate.{e.name}: {error}") from error
                self.held_out[e.name] = lines[: e.limit]
        require_readers({kind for kind, _ in self.media()})

    def media(self) -> Iterator[tuple[str, Path]]:
        """Kind and path of all media, those of held-out questions last."""
        for samples in self.samples.values():
            for sample in samples:
                yield from sample.media
        for questions in self.held_out.values():
            for question in questions:
                yield from asked_media(question)

    def counts(self) -> dict[str, int]:
        """Samples of each file."""
        return {name: len(samples) for name, samples in self.samples.items()}

    def texts(self) -> Iterator[str]:
        """What is said in all samples, for a tokenizer to be trained on."""
        for samples in self.samples.values():
            for sample in samples:
                for user, answer in sample.turns:
                    yield f"USER: {user} ASSISTANT: {answer}"
