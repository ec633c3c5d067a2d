"""Which implementation runs, and how a user overrides it."""

import os
import subprocess
import sys

import cases
import pytest
import registry
import torch

from unimoe_kernels import (
    _extension,
    available_backends,
    expert_sort,
    moe_mlp,
    permute,
    unpermute,
    use_backend,
)
from unimoe_kernels.info import backend_choices
from unimoe_kernels.testing import sample_routing

OPS = cases.operators()


def called(function):
    """Runs a function and returns its result and the overloads of ours that it called."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "unimoe":
                names.append(f"{func._opname}.{func._overloadname}")
            return func(*args, **(kwargs or {}))

    with Record():
        result = function()
    return result, names


def inputs(num_tokens=3):
    ids, scores = sample_routing("uniform", num_tokens, 2, 4)
    return torch.randn(num_tokens, 5), expert_sort(ids, 4), scores


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_operator_is_listed():
    assert sorted({row.op for row in backend_choices()}) == OPS
    assert sorted({row.device for row in backend_choices()}) == ["cpu", "cuda"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operator_has_its_reference(op, device):
    assert "reference" in available_backends(op, device)
    assert available_backends(op, device)[0] != "triton" or device == "cuda"
    (row,) = [row for row in backend_choices() if (row.op, row.device) == (op, device)]
    assert row.backend == available_backends(op, device)[0]
    assert row.reason


def test_devices_without_kernels_run_the_reference():
    assert available_backends("permute", "xpu") == ("reference",)
    x, sort, _ = inputs()
    sort = type(sort)(*(part.to("meta") for part in sort))
    assert permute(x.to("meta"), sort, 2).shape == (6, 5)


@pytest.mark.parametrize("name", available_backends("permute", "cpu"))
def test_backward_keeps_the_backend_of_the_forward(name):
    x, sort, scores = inputs()
    x.requires_grad_()
    with use_backend(name):
        y = unpermute(permute(x, sort, 2), sort, 2, scores)
    other = "reference" if name != "reference" else available_backends("permute", "cpu")[0]
    with use_backend(other):
        _, names = called(lambda: y.sum().backward())
    overload = {"cpp": "default"}.get(name, name)
    assert names == [f"unpermute_backward.{overload}", f"unpermute.{overload}"]


def test_use_backend_holds_for_composed_operators():
    x, _, scores = inputs()
    ids = torch.zeros(3, 2, dtype=torch.int32)
    weights = torch.randn(1, 6, 5), torch.randn(1, 5, 3)
    with use_backend("reference"):
        _, names = called(lambda: moe_mlp(x, *weights, ids, scores))
    assert names[0] == "moe_mlp.reference"
    assert {name.partition(".")[2] for name in names} == {"reference"}


def test_use_backend_restores_the_choice():
    before = backend_choices()
    with use_backend("reference"):
        assert {row.backend for row in backend_choices()} == {"reference"}
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert {row.backend for row in backend_choices()} == {"reference"}
    assert backend_choices() == before


def test_operators_without_the_backend_keep_their_choice(monkeypatch):
    registry.set_available(monkeypatch, "swiglu", {"cpu": ("reference",), "cuda": ("cuda",)})
    x, sort, _ = inputs()
    with use_backend("cuda"):
        _, names = called(lambda: permute(x, sort, 2))
    expected = "default" if available_backends("permute", "cpu")[0] == "cpp" else "reference"
    assert names == [f"permute.{expected}"]


def test_use_backend_rejects_what_it_cannot_do(monkeypatch):
    message = r"name \('gpu'\) must be one of reference, cpp, cuda"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass
    for op in OPS:
        registry.set_available(monkeypatch, op, {"cpu": ("reference",)})
    monkeypatch.setattr(_extension, "error", None)
    for name, reason in {
        "cuda": "unimoe_kernels._C is compiled without it",
        "triton": "the package triton is not installed",
    }.items():
        message = rf"name \('{name}'\) must be a backend of this installation: {reason}"
        with pytest.raises(RuntimeError, match=message), use_backend(name):
            pass
    monkeypatch.setattr(_extension, "error", "not compiled (pure-Python install)")
    message = r"name \('cpp'\) must be a backend of this installation: not compiled"
    with pytest.raises(RuntimeError, match=message), use_backend("cpp"):
        pass
    with pytest.raises(ValueError, match=r"op \('gemm'\) must be one of"):
        available_backends("gemm")


def test_default_overload_runs_without_a_kernel_of_its_own():
    x, sort, _ = inputs()
    expected = permute(x, sort, 2)
    assert torch.equal(
        torch.ops.unimoe.permute(x, sort.inverse_order, sort.expert_offsets, 2), expected
    )
    gate_up = torch.randn(2, 6)
    (actual, names) = called(lambda: torch.ops.unimoe.swiglu(gate_up, "silu", 7.0, 1.702))
    assert names == ["swiglu.default"]
    assert torch.equal(actual, torch.ops.unimoe.swiglu.reference(gate_up, "silu", 7.0, 1.702))


def test_environment_sets_the_backend():
    code = "from unimoe_kernels.info import backend_choices as b; print([r.backend for r in b()])"
    count = len(backend_choices())
    assert run_python(code, UNIMOE_BACKEND="reference").stdout == f"{['reference'] * count}\n"
    empty = run_python(code, UNIMOE_BACKEND="")  # counts as unset
    assert empty.stdout == f"{[row.backend for row in backend_choices()]}\n", empty.stderr
    failed = run_python(code, UNIMOE_BACKEND="fast")
    assert "ValueError: UNIMOE_BACKEND ('fast') must be one of reference, cpp" in failed.stderr


def test_environment_turns_value_checks_on():
    code = "import torch, unimoe_kernels as u; u.topk_router(torch.full((1, 2), torch.nan), 1)"
    failed = run_python(code, UNIMOE_CHECKS="1")
    assert "ValueError: logits (2 NaN) must not be NaN" in failed.stderr
    assert run_python(code, UNIMOE_CHECKS="0").returncode == 0


def test_without_triton_the_package_imports_and_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, unimoe_kernels as u\n"
        "assert 'triton' not in u.available_backends('permute', 'cuda')\n"
        "ids = torch.tensor([[0, 1]], dtype=torch.int32)\n"
        "print(u.permute(torch.ones(1, 1), u.expert_sort(ids, 2), 2).tolist())\n"
    )
    result = run_python(code)
    assert result.stdout == "[[1.0], [1.0]]\n", result.stderr
