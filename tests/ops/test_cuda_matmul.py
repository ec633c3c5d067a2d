"""Calls that the matmuls in CUDA C++ take run there, and all others elsewhere."""

import os
import subprocess
import sys
from contextlib import contextmanager

import emulated
import pytest
import registry
import torch

from unimoe_kernels import _backends, available_backends, info, moe_mlp, use_backend
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.cuda_matmul import Gpu
from unimoe_kernels.ops.grouped_mm import compiled as grouped_mm_compiled
from unimoe_kernels.ops.moe_mlp import composition
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Needs, Rows, Saved
from unimoe_kernels.testing import relative_error, sample_routing

HOPPER = Gpu((9, 0), ("8.0", "9.0a", "10.0", "12.0"))
D, F, E, K = 64, 48, 4, 2

pure_python = pytest.mark.skipif(
    registry.operator("moe_mlp").is_compiled_for("cpu"),
    reason="the extension's CPU kernels are in the place of what runs on a GPU",
)


@contextmanager
def on_hopper(monkeypatch, *ops):
    """Lets operators take CUDA C++ on CPU tensors, with stand-ins in torch for its kernels."""
    calls = []
    library = torch.library.Library("unimoe", "IMPL")
    gate = Gate("silu", 0.0, 0.0)

    def forward(x, gate_up, down, ids, scores, keep_hidden):
        calls.append("moe_mlp_cuda")
        weights = ExpertWeights(gate_up, down, None, None)
        arguments = x, ids.int(), scores, weights, gate, keep_hidden
        y, hidden, found = composition.forward("reference", *arguments)
        return y, hidden, *found

    def backward(grad, x, gate_up, down, scores, hidden, order, inverse, offsets, *needs):
        calls.append("moe_mlp_cuda_backward")
        weights = ExpertWeights(gate_up, down, None, None)
        saved = Saved(x, scores, weights, hidden, Rows(order, inverse, offsets))
        asked = Needs(*needs, first_bias=False, down_bias=False)
        return tuple(composition.backward("reference", grad, saved, gate, asked)[:4])

    library.impl("moe_mlp_cuda", forward, "CPU")
    library.impl("moe_mlp_cuda_inference", lambda *args: forward(*args, False)[0], "CPU")
    library.impl("moe_mlp_cuda_backward", backward, "CPU")
    monkeypatch.setattr(cuda_matmul, "STAND_IN", HOPPER)
    for op in ops:
        registry.set_available(monkeypatch, op, {"cpu": ("reference", "cuda"), "cuda": ("cuda",)})
    try:
        with use_backend("cuda"):
            yield calls
    finally:
        library._destroy()


def sample(dtype=torch.bfloat16, requires_grad=True, **changes):
    ids, scores = sample_routing("zipf", 40, K, E)
    floats = {
        "x": torch.randn(40, D),
        "gate_up_proj": torch.randn(E, 2 * F, D) / 8,
        "down_proj": torch.randn(E, D, F) / 7,
    }
    values = {name: value.to(dtype) for name, value in floats.items()} | {"scores": scores}
    values = {name: value.requires_grad_(requires_grad) for name, value in values.items()}
    return values | {"ids": ids} | changes


def run(arguments):
    y = moe_mlp(**arguments)
    wanted = [value for value in arguments.values() if getattr(value, "requires_grad", False)]
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)


def test_tests_of_pure_python_pass_without_the_extension():
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(emulated.EMULATION)]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no_extension"),
            *(__file__, "-k", "one_call or public_operator"),
        ],
        cwd=emulated.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(emulated.ROOT), *path])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "2 passed" in result.stdout


@pure_python
def test_layer_runs_in_one_call_each_way(monkeypatch):
    arguments = sample()
    expected = run(arguments)
    with on_hopper(monkeypatch, "moe_mlp", "moe_mlp_backward") as calls:
        actual = run(arguments)
    assert calls == ["moe_mlp_cuda", "moe_mlp_cuda_backward"]
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 2e-2
        assert b.any()


def test_inference_goes_to_the_compiled_operator_alone(monkeypatch):
    arguments = sample(requires_grad=False)
    expected = moe_mlp(**arguments)
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "unimoe":
                names.append(func.name())
            return func(*args, **(kwargs or {}))

    with on_hopper(monkeypatch, "moe_mlp") as calls:
        with Record():
            y = moe_mlp(**arguments)
        wide = moe_mlp(**arguments | {"ids": arguments["ids"].long()})
    assert names[0] == "unimoe::moe_mlp_cuda_inference"
    assert "unimoe::moe_mlp" not in names
    assert calls == ["moe_mlp_cuda"] * 2
    assert relative_error(y, expected) < 2e-2
    assert torch.equal(wide, y)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"activation": "gelu"},
        {"gate_up_bias": torch.randn(E, 2 * F).bfloat16()},
        {"down_bias": torch.randn(E, D).bfloat16()},
    ],
    ids=["float32", "gelu", "gate_up_bias", "down_bias"],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_is_refused_runs_elsewhere(monkeypatch, changes, requires_grad):
    arguments = sample(requires_grad=requires_grad, **changes)
    function = run if requires_grad else lambda arguments: (moe_mlp(**arguments),)
    expected = function(arguments)
    with on_hopper(monkeypatch, "moe_mlp", "moe_mlp_backward") as calls:
        actual = function(arguments)
    assert not calls
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 2e-2


def test_rows_that_begin_between_vectors_run_elsewhere(monkeypatch):
    arguments = sample(requires_grad=False)
    flat = torch.zeros(40 * D + 1, dtype=torch.bfloat16)
    flat[1:] = arguments["x"].flatten()
    expected = moe_mlp(**arguments)
    with on_hopper(monkeypatch, "moe_mlp") as calls:
        y = moe_mlp(**arguments | {"x": flat[1:].view(40, D)})
    assert not calls
    assert relative_error(y, expected) < 2e-2


@pure_python
def test_compiled_code_sees_the_public_operator(monkeypatch):
    arguments = sample(requires_grad=False)
    expected = moe_mlp(**arguments)
    with on_hopper(monkeypatch, "moe_mlp", "moe_mlp_backward") as calls:
        y = torch.compile(moe_mlp, fullgraph=True, backend="eager")(**arguments)
    assert calls == ["moe_mlp_cuda"]
    assert relative_error(y, expected) < 2e-2


@pytest.mark.parametrize("few", [True, False])
def test_products_go_to_the_kernel_that_takes_them(monkeypatch, few):
    calls = []
    library = torch.library.Library("unimoe", "IMPL")

    def product(name):
        def multiply(x, weight, expert_offsets):
            calls.append(name)
            return _backends.run("reference", "grouped_mm", x, weight, expert_offsets, None)

        return multiply

    for name in cuda_matmul.GROUPED_MM:
        library.impl(name, product(name), "CPU")

    def weight_gradient(grad, x, expert_offsets):
        calls.append("wgrad")
        run = _backends.run
        return run("reference", "grouped_mm_wgrad", grad, x, expert_offsets, False)[0]

    library.impl("grouped_mm_wgrad_sm90", weight_gradient, "CPU")
    monkeypatch.setattr(cuda_matmul, "STAND_IN", HOPPER)
    count = 32 * E if few else 32 * E + 1
    x, w = torch.randn(count, D).bfloat16(), torch.randn(E, F, D).bfloat16()
    offsets = torch.tensor([0, 10, 10, 50, count - 3], dtype=torch.int32)
    bias = torch.randn(E, F).bfloat16()
    try:
        y = grouped_mm_compiled.grouped_mm(x, w, offsets, None)
        grad_x = grouped_mm_compiled.grouped_mm(y, w.transpose(1, 2), offsets, None)
        grads = grouped_mm_compiled.grouped_mm_wgrad(y, x, offsets, False)
        biased = grouped_mm_compiled.grouped_mm(x, w, offsets, bias)
        both = grouped_mm_compiled.grouped_mm_wgrad(y, x, offsets, True)
    finally:
        library._destroy()
    assert calls == [
        "grouped_mm_few_rows" if few else "grouped_mm_sm90",
        "grouped_mm_sm90",
        "wgrad",
    ]
    assert (y.shape, grad_x.shape) == ((count, F), (count, D))
    assert [part.shape for part in grads] == [(E, F, D), (0, F)]
    assert [part.shape for part in both] == [(E, F, D), (E, F)]
    assert relative_error(both[0], grads[0]) < 1e-2
    assert not torch.equal(biased, y)


@pytest.mark.parametrize("op", ["grouped_mm", "moe_mlp"])
def test_triton_stays_the_default_until_tests_have_passed(monkeypatch, op):
    assert not cuda_matmul.PROVEN
    operator = registry.operator(op)
    monkeypatch.setattr(_backends, "_is_compiled", lambda name, device: name in operator.kernels)
    monkeypatch.setattr(_backends, "_triton_runs_on", lambda device: device == "cuda")
    assert _backends._order(operator, "cuda") == ("triton", "cuda", "reference")
    proven = registry.replaced(operator, proven=True)
    assert _backends._order(proven, "cuda") == ("cuda", "triton", "reference")
    registry.set_available(monkeypatch, op, {"cuda": ("triton", "cuda", "reference")})
    (row,) = [row for row in info.backend_choices() if (row.op, row.device) == (op, "cuda")]
    assert row.backend == "triton"
    assert row.reason == (
        "compiled; not the default until its GPU tests have passed: UNIMOE_BACKEND=cuda"
    )
    with use_backend("cuda"):
        (row,) = [row for row in info.backend_choices() if (row.op, row.device) == (op, "cuda")]
    assert (row.backend, row.reason) == ("cuda", "forced by use_backend or UNIMOE_BACKEND")


def test_without_the_kernels_the_order_is_what_it_was():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert "cuda" not in available_backends("grouped_mm", "cuda")
