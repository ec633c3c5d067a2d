"""Locating the weights of the paper's encoders, and loading those of transformers models."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from unimoe_model.encoders.base import FrozenEncoder

FOLDER_VARIABLE = "UNIMOE_ENCODERS"


def weights_source(name: str, repository: str) -> str:
    """Path in the folder `UNIMOE_ENCODERS` if it exists, else the repository name.

    Args:
        name: name of the folder or file in the folder that the environment variable names.
        repository: repository on the Hugging Face hub.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / name).exists():
        return str(Path(folder) / name)
    return repository


class PublishedEncoder(FrozenEncoder, ABC):
    """A frozen encoder built from the configuration of a transformers model.

    Attributes:
        repository: repository of the paper's weights on the Hugging Face hub.
        model_class: model class of transformers.
        model_types: values of `model_type` in `config.json` that are supported.
    """

    repository: str
    model_class: type[PreTrainedModel]
    model_types: tuple[str, ...]

    @abstractmethod
    def take_modules(self, model: PreTrainedModel) -> None:
        """Replaces the encoder's modules with those of a `model_class`."""

    @classmethod
    def pretrained(cls) -> Self:
        """Loads OpenAI's weights, which the paper uses; see `weights_source`.

        Raises:
            OSError: If they are neither on disk nor can be downloaded.
        """
        return cls.from_folder(weights_source(cls.repository.split("/")[-1], cls.repository))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Loads an encoder from a folder in the layout of transformers.

        Raises:
            OSError: If the weights are missing or cannot be read.
            ValueError: If the folder has no model, or one of another type.
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
        """Builds the encoder of a folder on the meta device, without weights.

        Raises:
            ValueError: If the folder has no model, or one of another type.
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
