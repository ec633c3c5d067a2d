"""What is measured is what a layer runs, on inputs whose results are checked."""

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels import moe_mlp, use_backend
from unimoe_kernels._triton.launch import Device, interpreted
from unimoe_kernels._triton.problem import MAX_ROWS, Tile
from unimoe_kernels._triton.tiles import analytic
from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
from unimoe_kernels.ops.moe_mlp import kernel, kernel_backward
from unimoe_kernels.testing import relative_error, sample_routing
from unimoe_kernels.tune.candidates import fits, neighbours
from unimoe_kernels.tune.cases import Case, Shape, cases_of
from unimoe_kernels.tune.matmuls import build
from unimoe_kernels.tune.search import MAX_ERRORS

SMALL = Shape(48, 32, 4, 2)
DEVICES = [Device(80, 108, 163 * 1024), Device(90, 132, 227 * 1024), Device(120, 170, 99 * 1024)]
PUBLISHED = [Shape(4096, 11008, 4, 2), Shape(2048, 768, 128, 8)]


# Nothing is multiplied here, so that what follows may add up anything.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_problems_are_those_that_a_layer_asks_for(monkeypatch):
    asked = set()
    for module in (grouped_mm, kernel, kernel_backward):
        original = module.choose

        def choose(problem, device, original=original):
            asked.add(problem)
            return original(problem, device)

        monkeypatch.setattr(module, "choose", choose)
    tokens = 1024
    ids, scores = sample_routing("uniform", tokens, SMALL.top_k, SMALL.experts)
    d, f, e, _ = SMALL
    values = [
        torch.randn(tokens, d),
        torch.randn(e, 2 * f, d),
        torch.randn(e, d, f),
        scores,
    ]
    values = [value.requires_grad_() for value in values]
    # Launches themselves would be slow under the interpreter, and are not looked at.
    for module in (grouped_mm, kernel, kernel_backward):
        for name in ("grouped_mm_kernel", "grouped_mm_wgrad_kernel", "gated_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, NoKernel())
    monkeypatch.setattr(kernel_backward, "gated_backward_kernel", NoKernel())
    monkeypatch.setattr(kernel_backward, "score_grad_kernel", NoKernel())
    with use_backend("triton"):
        x, gate_up, down, scores = values
        moe_mlp(x, gate_up, down, ids, scores).sum().backward()
    cases = cases_of([SMALL], [tokens], torch.float32)
    assert {case.problem for case in cases} == asked
    assert len(cases) == len(asked) == 6


class NoKernel:
    arg_names = ()

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_order_and_repetitions():
    cases = cases_of(PUBLISHED, [4096, 16, 4096], torch.bfloat16)
    names = [(case.name, case.tokens, case.shape.experts) for case in cases]
    assert names[:4] == [
        ("gate_up", 4096, 4),
        ("down", 4096, 4),
        ("gate_up", 4096, 128),
        ("down", 4096, 128),
    ]
    assert [tokens for _, tokens, _ in names[4:8]] == [16] * 4
    assert {name for name, *_ in names[8:]} == {
        "gated_backward",
        "grad_down",
        "grad_gate_up",
        "grad_x",
    }
    assert len({case.problem for case in cases}) == len(cases) == 16
    assert all(tokens == 4096 for _, tokens, _ in names[8:]), "nobody trains on 16 tokens"
    assert [case.name for case in cases_of(PUBLISHED[:1], [64], torch.float16, ["backward"])] == []


def test_no_more_rows_than_the_choice_tells_apart():
    (case, _) = cases_of([Shape(64, 64, 4, 2)], [10**6], torch.bfloat16, ["forward"])
    assert case.problem.rows == MAX_ROWS
    assert case.tokens == MAX_ROWS * 4 // 2


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.capability}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_neighbours_fit_and_differ(device, dtype):
    shapes = [*PUBLISHED, Shape(200, 300, 4, 2)]
    for case in cases_of(shapes, [4096, 16, 128], dtype):
        own = analytic(case.problem, device)
        found = neighbours(case.problem, own, device)
        assert len(set(found)) == len(found) >= 3, case
        assert own not in found
        assert all(fits(case.problem, tile, device) for tile in found)
        able = device.capability >= 90 and dtype == torch.bfloat16
        assert any(tile.descriptors != own.descriptors for tile in found) == able
        for field in ("group_m", "num_stages"):
            assert {getattr(tile, field) for tile in found} - {getattr(own, field)}, (case, field)


def test_what_does_not_fit():
    case, _ = cases_of(PUBLISHED[:1], [4096], torch.bfloat16, ["forward"])
    device, good = DEVICES[1], Tile(128, 128, 64, 8, 8, 3, True)
    assert fits(case.problem, good, device)
    for change in (
        {"block_m": 256},  # sums of both halves fill the registers
        {"num_warps": 4},
        {"num_stages": 5},  # shared memory
        {"block_k": 8},
        {"block_n": 512},
        {"num_stages": 0},
    ):
        assert not fits(case.problem, good._replace(**change), device), change
    assert not fits(case.problem, good, DEVICES[0]), "no descriptors on sm_80"
    few = case.problem._replace(rows=16)
    assert not fits(few, good, device), "tiles much higher than the rows"


@pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(6))
def test_kernels_give_the_exact_numbers(index, dtype):
    wanted = cases_of([SMALL], [1024], dtype)[index]
    case = Case(wanted.name, SMALL, 24, wanted.problem)
    matmul = build(case, torch.device("cpu"))
    experts = matmul.some_experts()
    assert len(experts) == 2
    exact = [matmul.exact(own) for own in experts]
    for descriptors in (False, True):
        outputs = matmul.launch(Tile(16, 32, 32, 2, 4, 1, descriptors))
        for own, expected in zip(experts, exact, strict=True):
            for actual, right in zip(matmul.part(outputs, own), expected, strict=True):
                assert 0.3 < right.abs().max() < 30
                assert relative_error(actual, right) < MAX_ERRORS[dtype]
