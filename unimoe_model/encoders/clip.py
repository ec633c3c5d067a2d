"""CLIP's vision transformer: the eyes of the paper (ViT-L/14 at 336 pixels)."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from unimoe_model.encoders.base import FrozenEncoder

LAYER = -2
"""Whose output the connector reads, as in LLaVA; the last one serves CLIP's own training."""


class ClipImageEncoder(FrozenEncoder):
    """The frozen vision transformer of CLIP over images and frames of videos.

    Built with random weights; :meth:`from_folder` reads those of a model of transformers.

    Args:
        config: sizes; None is ViT-L/14 at 336 pixels.
    """

    def __init__(self, config: CLIPVisionConfig | None = None) -> None:
        config = config or CLIPVisionConfig(
            image_size=336,
            patch_size=14,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=768,
        )
        super().__init__("CLIP", feature_size=config.hidden_size)
        self.vision_tower = CLIPVisionModel(config)
        self.freeze()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ClipImageEncoder":
        """The encoder with the weights of a folder in the layout of transformers.

        Raises:
            OSError: if the folder holds no model.
        """
        tower = CLIPVisionModel.from_pretrained(folder)
        with torch.device("meta"):
            encoder = cls(tower.config)
        encoder.vision_tower = tower
        encoder.freeze()
        return encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixel_values: ``[..., 3, size, size]`` as CLIP's image processor gives them.

        Returns:
            ``[..., (size / patch) ** 2, C]`` in the dtype of the weights, without the class token.

        Raises:
            ValueError: another shape.
        """
        size = self.vision_tower.config.image_size
        if pixel_values.ndim < 3 or pixel_values.shape[-3:] != (3, size, size):
            raise ValueError(
                f"pixel_values (shape {list(pixel_values.shape)}) must be of shape "
                f"[..., 3, {size}, {size}]"
            )
        weight = self.vision_tower.get_input_embeddings().weight
        images = pixel_values.reshape(-1, 3, size, size).to(weight.device, weight.dtype)
        with torch.no_grad():
            states = self.vision_tower(images, output_hidden_states=True).hidden_states
        patches = states[LAYER][:, 1:]
        return patches.reshape(*pixel_values.shape[:-3], *patches.shape[1:])
