"""Rounding by inputs, on inputs that it has not seen."""

import pytest
import torch

from unimoe_kernels.quantization.calibrated import quantize_weight_by_inputs
from unimoe_kernels.quantization.rounding import dequantize_weight, quantize_weight

WIDTH = 256


def relative_errors(counts, mixes, format="int4", **options):
    """Errors of rounding to nearest and by inputs, of each expert, on other inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(counts), 96, WIDTH, generator=generator)
    inputs = [
        torch.randn(count, len(mix), generator=generator) @ mix
        for count, mix in zip(counts, mixes, strict=True)
    ]
    moments = torch.stack([x.T @ x for x in inputs])
    nearest = quantize_weight(weight, format, 64, **options)
    fitted = quantize_weight_by_inputs(weight, moments, counts, format, 64, **options)
    errors = []
    for rounded in (nearest, fitted):
        change = dequantize_weight(rounded) - weight
        for e, mix in enumerate(mixes):
            x = torch.randn(2000, len(mix), generator=generator) @ mix
            errors.append(((x @ change[e].T).norm() / (x @ weight[e].T).norm()).item())
    return errors[: len(counts)], errors[len(counts) :]


def white():
    return torch.eye(WIDTH)


def correlated():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH // 4, WIDTH, generator=generator) / 8
    return torch.cat([mix, 0.1 * torch.eye(WIDTH)])


@pytest.mark.parametrize("zero_points", [False, True])
def test_uncorrelated_inputs_cost_nothing(zero_points):
    """However few there are; without shrinkage the error rises to 1.6 times the other."""
    counts = [16, 64, 256, 1024]
    nearest, fitted = relative_errors(counts, [white()] * 4, zero_points=zero_points)
    assert all(ours < 1.01 * theirs for ours, theirs in zip(fitted, nearest, strict=True))
    assert min(nearest) > 0.05


def test_correlated_inputs_gain_with_their_number():
    nearest, fitted = relative_errors([16, 64, 256, 1024], [correlated()] * 4)
    gains = [ours / theirs for ours, theirs in zip(fitted, nearest, strict=True)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] < 0.97
    assert gains[-1] < 0.5


def test_int8():
    nearest, fitted = relative_errors([16, 1024], [white(), correlated()], format="int8")
    assert fitted[0] < 1.01 * nearest[0]
    assert fitted[1] < 0.6 * nearest[1]


def test_inputs_that_are_always_zero():
    mix = torch.eye(WIDTH)
    mix[:, ::2] = 0
    nearest, fitted = relative_errors([300], [mix])
    assert fitted[0] < 1.01 * nearest[0]
