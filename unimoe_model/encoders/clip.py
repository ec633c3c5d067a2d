"""CLIP's vision transformer, the paper's encoder of images (ViT-L/14 at 336 pixels)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from unimoe_model.encoders.published import PublishedEncoder
from unimoe_model.extras import needed_by

LAYER = -2
"""Layer whose output the connector receives: the last but one, as in LLaVA."""


class ClipImageEncoder(PublishedEncoder):
    """The frozen vision transformer of CLIP, for images and video frames.

    Built with random weights; :meth:`from_folder` loads those of a transformers model.

    Args:
        config: sizes; by default those of ViT-L/14 at 336 pixels.
    """

    repository = "openai/clip-vit-large-patch14-336"
    model_class = CLIPVisionModel
    model_types = ("clip", "clip_vision_model")

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
        super().__init__(
            "CLIP",
            feature_size=config.hidden_size,
            picture_tokens=(config.image_size // config.patch_size) ** 2,
        )
        self.vision_tower = CLIPVisionModel(config)
        self.freeze()

    def take_modules(self, model: CLIPVisionModel) -> None:
        """Uses the whole model."""
        self.vision_tower = model

    def encode_pictures(self, pictures: Sequence[Tensor], pad_to_square: bool = False) -> Tensor:
        """Encodes pictures of any size.

        Args:
            pictures: `[H, W, 3]` uint8 each.
            pad_to_square: pads the shorter side with CLIP's mean colour (LLaVA's `pad`) instead
                of cropping the centre square.

        Returns:
            `[n, (size / patch) ** 2, C]`.
        """
        return self(self.pixel_values(pictures, pad_to_square))

    def pixel_values(self, pictures: Sequence[Tensor], pad_to_square: bool = False) -> Tensor:
        """Preprocesses pictures to the transformer's input, `[n, 3, size, size]` float32."""
        with needed_by("CLIP"):
            from PIL import Image
        from transformers import CLIPImageProcessorPil

        size = self.vision_tower.config.image_size
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        images = [Image.fromarray(picture.numpy()) for picture in pictures]
        if pad_to_square:
            colour = tuple(int(255 * mean) for mean in processor.image_mean)
            images = [_padded(image, colour) for image in images]
        return processor(images, return_tensors="pt")["pixel_values"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixel_values: `[..., 3, size, size]`, from CLIP's image processor.

        Returns:
            `[..., (size / patch) ** 2, C]` in the dtype of the weights, without the class token.

        Raises:
            ValueError: If `pixel_values` have a wrong shape.
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


def _padded(image, colour: tuple[int, int, int]):
    """Centres a Pillow image in a square of its longer side."""
    with needed_by("CLIP"):
        from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
