"""Dropout of the features of images and videos, by channel."""

import torch

_KEYS = ("image_features", "video_features")


def drop_image_channels(inputs: dict[str, torch.Tensor], p: float) -> dict[str, torch.Tensor]:
    """Sets channels of the encoder's features to zero and scales the others by `1 / (1 - p)`.

    A channel is dropped at all patches and frames of an item, as by spatial dropout
    (arXiv:1411.4280). Connectors fit the pictures that they are trained on closely, so that an LLM
    trained on the same pictures meets soft tokens that are cleaner than those of new ones; with
    dropped channels they are less clean.

    Args:
        inputs: inputs of `UniMoEForConditionalGeneration.forward`; `image_features` is
            `[images, n, C]`, `video_features` `[videos, frames, n, C]`, and either may be missing.
        p: probability that a channel is dropped, at least 0 and less than 1.

    Returns:
        The inputs, with new features; other inputs are the same tensors.
    """
    if not p:
        return inputs
    dropped = {}
    for key in _KEYS:
        features = inputs.get(key)
        if features is not None:
            shape = (len(features), *[1] * (features.dim() - 2), features.shape[-1])
            kept = torch.rand(shape, device=features.device) >= p
            dropped[key] = features * kept.to(features.dtype) / (1 - p)
    return inputs | dropped
