"""Every instruction set that this CPU has, forced one after the other in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys

import torch

from unimoe_kernels import (
    _C,
    dequantize_weight,
    expert_sort,
    grouped_lora,
    grouped_mm,
    grouped_mm_quantized,
    moe_mlp,
    moe_mlp_quantized,
    pack_weights,
    quantize_weight,
    swiglu,
    topk_router,
    unpermute,
    use_backend,
)
from unimoe_kernels.testing import relative_error

assert _C.build_info()["cpu_isa"] == sys.argv[1]
torch.manual_seed(0)
GROUPS = [0, 1, 3, 70, 8, 129]
N, E = sum(GROUPS), len(GROUPS)
offsets = torch.tensor([0, *GROUPS]).cumsum(0).int()

def of_norm(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()

def check(name, op, inputs, limit, dtype, rounding=0.25):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = op(*wide)
    assert expected.abs().max() > 0.1
    grad = torch.randn_like(expected).to(dtype)

    def answers(own):
        y = op(*own)
        return y, *torch.autograd.grad(y, own, grad.to(y.dtype))

    ours, want = answers(leaves), answers(wide)
    with use_backend("reference"):
        of_torch = answers(leaves)
    for got, plain, exact in zip(ours, of_torch, want, strict=True):
        assert relative_error(got, exact) < limit, (name, dtype, relative_error(got, exact))
        most = 2 * of_norm(plain, exact) + torch.finfo(dtype).eps * rounding
        # Of a few numbers alone the errors are a matter of luck.
        if exact.numel() >= 100:
            assert of_norm(got, exact) <= most, (name, dtype, of_norm(got, exact), most)

for dtype, limit in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    for D, F in ((1, 1), (33, 50), (64, 96), (129, 17), (1100, 30)):
        x, w = torch.randn(N, D), torch.randn(E, F, D) / D**0.5
        b = torch.randn(E, F)
        check("mm", lambda x, w, b: grouped_mm(x, w, offsets, b), (x, w, b), limit, dtype)
        turned = lambda x, w: grouped_mm(x, w.transpose(1, 2), offsets)
        check("turned", turned, (x, w.transpose(1, 2).contiguous()), limit, dtype)
        a = torch.randn(E, 3, D) / D**0.5
        lora = lambda x, a, b: grouped_lora(x, a, b, offsets)
        check("lora", lora, (x, a, torch.randn(E, F, 3)), limit, dtype)
    for T, D, F in ((1, 33, 50), (40, 17, 49), (200, 33, 50)):
        ids = torch.randint(0, 5, (T, 2), generator=torch.Generator().manual_seed(1))
        x, up = torch.randn(T, D), torch.randn(4, 2 * F, D) / D**0.5
        down, scores = torch.randn(4, D, F) / F**0.5 * 2, torch.rand(T, 2)
        for activation in ("silu", "swiglu_clamped"):
            mlp = lambda *a: moe_mlp(*a[:3], ids, *a[3:], activation=activation)
            inputs = (x, up, down, scores)
            check(activation + " mlp", mlp, inputs, 4 * limit, dtype)
            inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
            kept = mlp(*inputs)
            with torch.no_grad():
                assert torch.equal(mlp(*inputs), kept)
            experts = torch.nn.Module()
            experts.gate_up_proj, experts.down_proj = inputs[1:3]
            pack_weights(experts)
            with torch.no_grad():
                assert torch.equal(mlp(*inputs), kept)
    for format, group, options in (
        ("int8", None, {}),
        ("int8", 32, {}),
        ("int8", 128, {}),
        ("int4", 32, {}),
        ("int4", 128, {}),
        ("int4", 64, {"zero_points": True}),
    ):
        for D, F in ((128, 50), (1152, 30), *(((1, 1), (33, 50)) if group is None else ())):
            weight = quantize_weight(torch.randn(E, F, D) / D**0.5, format, group, **options)
            floats = dequantize_weight(weight, torch.float64)
            # Beside matmuls of the same numbers, which plain torch rounds to the dtype first.
            for w, turned, width in ((weight, False, D), (weight, True, F)):
                def quantized(x, b):
                    if x.dtype == torch.float64:
                        own = floats.transpose(1, 2) if turned else floats
                        return grouped_mm(x, own, offsets, b)
                    return grouped_mm_quantized(x, w, offsets, b, transposed=turned)
                x, b = torch.randn(N, width), torch.randn(E, D + F - width)
                # Each group's sum is rounded once more, with its scale.
                check(format, quantized, (x, b), limit, dtype, rounding=1)
    first = quantize_weight(torch.randn(4, 256, 64) / 8, "int4", 32)
    down = quantize_weight(torch.randn(4, 64, 128) / 11, "int8")
    for T in (1, 7, 100):
        ids = torch.randint(0, 5, (T, 2), generator=torch.Generator().manual_seed(1))
        def experts(x, scores):
            if x.dtype == torch.float64:
                weights = (dequantize_weight(w, x.dtype) for w in (first, down))
                return moe_mlp(x, *weights, ids, scores)
            return moe_mlp_quantized(x, first, down, ids, scores)
        inputs = (torch.randn(T, 64), torch.rand(T, 2))
        check("experts", experts, inputs, 4 * limit, dtype, rounding=1)
    for T, D, K in ((9, 1, 1), (9, 17, 2), (50, 70, 3), (20, 200, 8)):
        sort = expert_sort(torch.randint(0, 5, (T, K), dtype=torch.int32), 4)
        sums = lambda rows, scores: unpermute(rows, sort, K, scores)
        check("sums", sums, (torch.randn(T * K, D), torch.rand(T, K)), limit, dtype)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"):
        for width in (1, 15, 16, 100):
            gate_up = 4 * torch.randn(7, 2 * width)
            check(activation, lambda g: swiglu(g, activation), (gate_up,), limit, dtype)
for E in (1, 3, 16, 37):
    logits = 3 * torch.randn(9, E)
    losses = lambda l: torch.stack(topk_router(l, 1)[3:])
    scores = lambda l: topk_router(l, min(E, 4), mode="softmax_topk").scores
    for name, op in (("losses", losses), ("scores", scores)):
        check(name, op, (logits,), 3e-6, torch.float32)
unlikely = topk_router(torch.tensor([[0.0, -80.0, -300.0, -float("inf")]]), 4, mode="softmax_topk")
assert relative_error(unlikely.scores[0, 1:2], torch.tensor([-80.0]).double().exp()) < 1e-5
assert unlikely.scores[0, 2:].tolist() == [0, 0]
assert topk_router(torch.full((2, 5), float("nan")), 2).scores.isnan().all()
extreme = torch.tensor([[-1e4, -100.0, -90.0, 0.0, 90.0, 1e4, float("nan")] + [1.0] * 7])
y = swiglu(extreme)
assert torch.isfinite(y[0, :6]).all() and y[0, 6].isnan()
assert relative_error(y[:, :6], torch.nn.functional.silu(extreme[:, :6])) < 1e-6
"""


def instruction_sets():
    _C = pytest.importorskip("unimoe_kernels._C")
    return _C.build_info()["cpu_isas"]


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_is_right(name):
    if name not in instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    result = run(name)
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_refused():
    instruction_sets()
    result = run("avx1024")
    assert result.returncode != 0
    assert "UNIMOE_CPU_ISA (avx1024) must be portable, avx2" in result.stderr


def test_an_empty_instruction_set_counts_as_unset():
    best = instruction_sets()[-1]
    result = run("", "from unimoe_kernels import _C; print(_C.build_info()['cpu_isa'])")
    assert result.stdout == f"{best}\n", result.stderr


def run(name, script=SCRIPT):
    return subprocess.run(
        [sys.executable, "-c", script, name],
        env=os.environ | {"UNIMOE_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 2, 1], [0, 2, 4]])
def test_offsets_that_would_leave_the_rows_are_refused(offsets):
    instruction_sets()
    x, weight = torch.ones(3, 2), torch.ones(2, 4, 2)
    expert_offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"expert_offsets\[\d\] \(\d\) must be"):
        torch.ops.unimoe.grouped_mm.default(x, weight, expert_offsets, None)
