"""The samples that a recipe trains on, read once and checked before anything is loaded."""

from collections.abc import Iterator
from pathlib import Path

from unimoe_model.data.conversations import Conversation, data_digest, read_conversations
from unimoe_model.training.recipe import Recipe


class RecipeData:
    """All data of a recipe.

    Attributes:
        samples: conversations by the name of their data.
        digests: of each file and its media.

    Args:
        recipe: names the files.

    Raises:
        ValueError: If a file is not as `read_conversations` describes, or media are missing.
    """

    def __init__(self, recipe: Recipe):
        self.samples: dict[str, list[Conversation]] = {}
        self.digests: dict[str, str] = {}
        for name, file in recipe.data.items():
            path, media = Path(file.file), file.media and Path(file.media)
            try:
                self.samples[name] = read_conversations(path, media)
            except ValueError as error:
                raise ValueError(f"{recipe.path}: data.{name}: {error}") from error
            self.digests[name] = data_digest(path, self.samples[name])

    def counts(self) -> dict[str, int]:
        """Samples of each file."""
        return {name: len(samples) for name, samples in self.samples.items()}

    def texts(self) -> Iterator[str]:
        """What is said in all samples, for a tokenizer to be trained on."""
        for samples in self.samples.values():
            for sample in samples:
                for user, answer in sample.turns:
                    yield f"USER: {user} ASSISTANT: {answer}"
