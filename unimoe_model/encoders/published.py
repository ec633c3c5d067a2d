"""Where the weights of the paper's encoders are looked for, and how transformers' are read."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from unimoe_model.encoders.base import FrozenEncoder

FOLDER_VARIABLE = "UNIMOE_ENCODERS"


def weights_source(name: str, repository: str) -> str:
    """A folder or file of `UNIMOE_ENCODERS`, or else the repository of the Hugging Face hub.

    Args:
        name: of the folder or file below the one that the environment variable names.
        repository: what transformers downloads, or finds in its cache, where there is none.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / name).exists():
        return str(Path(folder) / name)
    return repository


class PublishedEncoder(FrozenEncoder, ABC):
    """A frozen encoder made of a model of transformers, from whose `config` it is built.

    Attributes:
        repository: of the paper's weights on the Hugging Face hub.
        model_class: of transformers.
        model_types: that its `config.json` may name.
    """

    repository: str
    model_class: type[PreTrainedModel]
    model_types: tuple[str, ...]

    @abstractmethod
    def take_modules(self, model: PreTrainedModel) -> None:
        """Puts the modules of a `model_class` in place of the encoder's own."""

    @classmethod
    def pretrained(cls) -> Self:
        """The encoder of the paper, with OpenAI's weights; see `weights_source`.

        Raises:
            OSError: If they are neither here nor can be downloaded.
        """
        return cls.from_folder(weights_source(cls.repository.split("/")[-1], cls.repository))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """The encoder with the weights of a folder in the layout of transformers.

        Raises:
            OSError: If the weights are missing or cannot be read.
            ValueError: If the folder holds no model, or one of another type.
        """
        cls._require_type(folder)
        model = cls.model_class.from_pretrained(folder)
        with torch.device("meta"):
            encoder = cls(model.config)
        encoder.take_modules(model)
        encoder.freeze()
        return encoder

    @classmethod
    def empty_from_folder(cls, folder: str | Path) -> Self:
        """The encoder of a folder on the meta device, without weights: for its sizes.

        Raises:
            ValueError: If the folder holds no model, or one of another type.
        """
        cls._require_type(folder)
        config = cls.model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def _require_type(cls, folder: str | Path) -> None:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind not in cls.model_types:
            raise ValueError(
                f"model_type ({kind!r}) in config.json of {str(folder)!r} must be"
                f" {' or '.join(cls.model_types)}"
            )
