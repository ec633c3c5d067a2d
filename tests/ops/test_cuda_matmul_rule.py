"""Which calls the matmuls in CUDA C++ take, and the reasons by which others are refused."""

import pytest
import torch

from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.cuda_matmul import Choice, Gpu, Layout

HOPPER = Gpu((9, 0), ("8.0", "9.0a", "10.0", "12.0"))
AMPERE = Gpu((8, 0), ("8.0",))
D, F, E, K = 64, 48, 4, 2
MANY, FEW = 4096, 16


def rows(count, width=D, dtype=torch.bfloat16, aligned=True):
    return Layout(torch.Size((count, width)), (width, 1), dtype, aligned)


def weight(experts=E, height=2 * F, width=D, dtype=torch.bfloat16, strides=None, aligned=True):
    strides = strides or (height * width, width, 1)
    return Layout(torch.Size((experts, height, width)), strides, dtype, aligned)


def layer(gpu=HOPPER, tokens=MANY, keep_hidden=False, **changes):
    arguments = {
        "x": rows(tokens),
        "gate_up": weight(),
        "down": weight(height=D, width=F),
        "top_k": K,
        "activation": "silu",
        "has_bias": False,
    }
    return cuda_matmul.choose_layer(gpu, **{**arguments, **changes}, keep_hidden=keep_hidden)


@pytest.mark.parametrize(
    ("gpu", "tokens", "keep_hidden", "kernel"),
    [
        (HOPPER, MANY, False, "sm90"),
        (HOPPER, MANY, True, "sm90"),
        (HOPPER, FEW, True, "sm90"),
        (HOPPER, FEW, False, "few_rows"),
        (HOPPER, 32 * E // K, False, "few_rows"),
        (HOPPER, 32 * E // K + 1, False, "sm90"),
        (AMPERE, FEW, False, "few_rows"),
        (Gpu((12, 0), ("12.0",)), FEW, False, "few_rows"),
        (Gpu((9, 0), ("8.0", "9.0")), FEW, False, "few_rows"),
    ],
)
def test_layer_is_taken_by(gpu, tokens, keep_hidden, kernel):
    assert layer(gpu, tokens, keep_hidden) == Choice(kernel)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": None}, "no GPU"),
        ({"gpu": Gpu((7, 5), ("7.5",))}, "compute capability 7.5"),
        ({"gpu": AMPERE}, "compute capability 8.0 with many rows or a backward"),
        ({"gpu": AMPERE, "tokens": FEW, "keep_hidden": True}, "compute capability 8.0"),
        ({"gpu": Gpu((10, 0), ("10.0",))}, "compute capability 10.0"),
        ({"gpu": Gpu((9, 0), ("8.0", "9.0"))}, "not compiled for 9.0a"),
        ({"x": rows(MANY, dtype=torch.float32)}, "dtype float32"),
        ({"x": rows(MANY, dtype=torch.float64)}, "dtype float64"),
        ({"activation": "gelu"}, "activation gelu"),
        ({"activation": "swiglu_clamped"}, "activation swiglu_clamped"),
        ({"has_bias": True}, "bias"),
        ({"gate_up": weight(513), "down": weight(513, D, F)}, "513 experts"),
        ({"x": rows(0)}, "0 rows"),
        ({"top_k": 0}, "no routed rows"),
        ({"x": rows(2**30)}, f"{2**31} rows"),
        ({"x": rows(MANY, 60)}, "width 60 of x"),
        ({"x": rows(MANY, aligned=False)}, "address of x"),
        ({"x": rows(MANY)._replace(strides=(2 * D, 1))}, "strides"),
        ({"gate_up": weight(height=100), "down": weight(height=D, width=50)}, "shape"),
        ({"gate_up": weight(aligned=False)}, "address of gate_up_proj"),
        ({"gate_up": weight(strides=(2 * F * D, 1, 2 * F))}, "strides"),
        ({"down": weight(height=D, width=F, strides=(D * F, 1, D))}, "strides"),
        ({"down": weight(height=D, width=F, strides=(D * (F + 4), F + 4, 1))}, "strides"),
        ({"down": weight(height=D, width=F, strides=(0, F, 1))}, "strides"),
        ({"down": weight(height=D, width=F, aligned=False)}, "address of down_proj"),
    ],
)
def test_layer_is_refused_by_name(changes, reason):
    choice = layer(**changes)
    assert choice.kernel is None
    assert reason in choice.reason


def test_strides_with_room_between_rows_are_taken():
    wide = weight(strides=(2 * F * (D + 8), D + 8, 1))
    assert layer(gate_up=wide) == Choice("sm90")
    # Of one expert the stride between experts means nothing.
    one = weight(1, strides=(7, D, 1))
    assert layer(gate_up=one, down=weight(1, D, F, strides=(3, F, 1))) == Choice("sm90")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((HOPPER, rows(MANY), weight(), False), "sm90"),
        ((HOPPER, rows(MANY), weight(strides=(2 * F * D, 1, 2 * F)), False), "sm90"),
        ((HOPPER, rows(32 * E), weight(), False), "few_rows"),
        # Few rows stream weights along their depth alone.
        ((HOPPER, rows(FEW), weight(strides=(2 * F * D, 1, 2 * F)), False), "sm90"),
        ((AMPERE, rows(FEW), weight(strides=(2 * F * D, 1, 2 * F)), False), None),
        ((AMPERE, rows(MANY), weight(), False), None),
        ((HOPPER, rows(MANY), weight(), True), None),
        ((HOPPER, rows(MANY), weight(strides=(2 * F * D, 2, 4 * F)), False), None),
        ((HOPPER, rows(MANY), weight(height=4), False), None),
        ((None, rows(MANY), weight(), False), None),
    ],
)
def test_product_is_taken_by(arguments, expected):
    choice = cuda_matmul.choose_product(*arguments)
    assert choice.kernel == expected
    assert bool(choice.reason) == (expected is None)


@pytest.mark.parametrize(
    ("grad", "x", "experts", "has_bias", "gpu", "expected"),
    [
        (rows(MANY, F), rows(MANY), E, False, HOPPER, "sm90"),
        (rows(0, F), rows(0), E, False, HOPPER, "sm90"),
        (rows(MANY, F), rows(MANY), E, True, HOPPER, None),
        (rows(MANY, F), rows(MANY), E, False, AMPERE, None),
        (rows(MANY, 4), rows(MANY), E, False, HOPPER, None),
        (rows(MANY, F), rows(MANY, 0), E, False, HOPPER, None),
        (rows(MANY, F), rows(MANY), 1000, False, HOPPER, None),
        (rows(MANY, F, aligned=False), rows(MANY), E, False, HOPPER, None),
        (rows(MANY, F)._replace(strides=(0, 1)), rows(MANY), E, False, HOPPER, None),
    ],
)
def test_weight_gradient_is_taken_by(grad, x, experts, has_bias, gpu, expected):
    choice = cuda_matmul.choose_weight_gradient(gpu, grad, x, experts, has_bias)
    assert choice.kernel == expected
    assert bool(choice.reason) == (expected is None)


@pytest.mark.parametrize(
    ("grad", "has_bias", "gpu", "expected"),
    [
        (rows(FEW), False, HOPPER, "sm90"),
        (rows(FEW), True, HOPPER, None),
        (rows(FEW), False, AMPERE, None),
        (rows(FEW, aligned=False), False, HOPPER, None),
    ],
)
def test_layer_backward_is_taken_by(grad, has_bias, gpu, expected):
    layouts = grad, rows(FEW), weight(), weight(height=D, width=F)
    choice = cuda_matmul.choose_layer_backward(gpu, *layouts, K, "silu", has_bias)
    assert choice.kernel == expected


def test_architectures_are_read_from_the_list_of_the_build():
    assert cuda_matmul.split_archs("8.0;9.0a;12.0+PTX") == ("8.0", "9.0a", "12.0")
    assert cuda_matmul.split_archs("8.0+PTX 9.0") == ("8.0", "9.0")
    assert cuda_matmul.split_archs("") == ()
