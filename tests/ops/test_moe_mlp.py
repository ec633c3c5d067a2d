import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from unimoe_kernels import _checks, available_backends, moe_mlp, swiglu, use_backend
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS
from unimoe_kernels.testing import ROUTINGS, assert_close_to_float64, relative_error, sample_routing

OP = "moe_mlp"
NAMES = ("x", "gate_up_proj", "down_proj", "scores", "gate_up_bias", "down_bias")


def mlp_by_hand(x, gate_up_proj, down_proj, ids, scores, gate_up_bias, down_bias, activation):
    """The definition in float64: every token through every expert, most with weight zero."""
    y = torch.zeros_like(x)
    for e in range(gate_up_proj.shape[0]):
        hidden = x @ gate_up_proj[e].t()
        hidden = hidden if gate_up_bias is None else hidden + gate_up_bias[e]
        with use_backend("reference"):
            out = swiglu(hidden, activation) @ down_proj[e].t()
        out = out if down_bias is None else out + down_bias[e]
        y = y + (scores * (ids == e)).sum(1, keepdim=True) * out
    return y


def sample(
    num_tokens=9,
    d=24,
    f=16,
    num_experts=4,
    top_k=2,
    kind="uniform",
    held=None,
    biased=False,
    dtype=torch.float32,
    device="cpu",
):
    """Arguments of `moe_mlp` as a dict; outputs and gradients are of order one."""
    held = held or num_experts
    ids, scores = sample_routing(kind, num_tokens, top_k, num_experts)
    floats = {
        "x": torch.randn(num_tokens, d),
        "gate_up_proj": torch.randn(held, 2 * f, d) / d**0.5,
        "down_proj": torch.randn(held, d, f) / f**0.5,
        "gate_up_bias": torch.randn(held, 2 * f) if biased else None,
        "down_bias": torch.randn(held, d) if biased else None,
    }
    arguments = {k: v if v is None else v.to(device, dtype) for k, v in floats.items()}
    scores = scores.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return arguments | {"ids": ids.to(device), "scores": scores}


def with_grad(arguments, **options):
    return {
        name: value.detach().to(**options).requires_grad_()
        if name in NAMES and value is not None
        else value
        for name, value in arguments.items()
    }


def run(function, arguments, grad, **options):
    """Returns the output and the gradients of all differentiable arguments."""
    y = function(**arguments, **options)
    inputs = [arguments[name] for name in NAMES if arguments[name] is not None]
    return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype), materialize_grads=True)


def test_moe_mlp_example(backend):
    arguments = sample(num_experts=1, top_k=1, device=backend.device)
    arguments["scores"] = torch.ones(9, 1, device=backend.device)
    hidden = swiglu(arguments["x"] @ arguments["gate_up_proj"][0].t())
    torch.testing.assert_close(moe_mlp(**arguments), hidden @ arguments["down_proj"][0].t())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_moe_mlp_matches_float64(backend, dtype, kind, biased):
    # Expert 4 belongs to another rank.
    arguments = with_grad(
        sample(num_experts=5, held=4, kind=kind, biased=biased, dtype=dtype, device=backend.device)
    )
    grad = torch.randn(9, 24, device=backend.device).to(dtype)
    actual = run(moe_mlp, arguments, grad)
    with use_backend("reference"):
        baseline = run(moe_mlp, arguments, grad)
    exact = with_grad(arguments, dtype=torch.float64)
    expected = run(mlp_by_hand, exact, grad, activation="silu")
    assert actual[0].dtype == dtype
    names = ["y"] + [f"grad of {name}" for name in NAMES if arguments[name] is not None]
    for name, *values in zip(names, actual, expected, baseline, strict=True):
        assert_close_to_float64(*values, name, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_mlp_activations(backend, activation):
    arguments = with_grad(sample(biased=True, device=backend.device))
    grad = torch.randn(9, 24, device=backend.device)
    actual = run(moe_mlp, arguments, grad, activation=activation)
    exact = with_grad(arguments, dtype=torch.float64)
    expected = run(mlp_by_hand, exact, grad, activation=activation)
    for name, *values in zip(("y", *NAMES), actual, expected, strict=True):
        assert_close_to_float64(*values, name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_moe_mlp_keeps_nan(backend, activation, dtype):
    arguments = sample(biased=True, dtype=dtype, device=backend.device)
    arguments["gate_up_bias"][2, 3] = float("nan")  # one gate of one expert
    arguments = with_grad(arguments)
    grad = torch.randn(9, 24, device=backend.device).to(dtype)
    y, *grads = run(moe_mlp, arguments, grad, activation=activation)
    reached = (arguments["ids"] == 2).any(1)
    assert 0 < reached.sum() < 9
    assert y[reached].isnan().all()
    assert y[~reached].isfinite().all()
    with use_backend("reference"):
        exact = with_grad(arguments, dtype=torch.float64)
        _, *expected = run(moe_mlp, exact, grad, activation=activation)
    for ours, others in zip(grads, expected, strict=True):
        assert others.isfinite().any()
        torch.testing.assert_close(ours.double(), others, rtol=0.1, atol=0.1, equal_nan=True)


@pytest.mark.parametrize("biased", [False, True])
def test_moe_mlp_gradcheck(backend, biased):
    arguments = with_grad(
        sample(3, 2, 2, 4, 2, held=3, biased=biased, dtype=torch.float64, device=backend.device)
    )
    names = [name for name in NAMES if arguments[name] is not None]

    def run(*values):
        return moe_mlp(**{**arguments, **dict(zip(names, values, strict=True))})

    fast = backend.interpreted
    inputs = [arguments[name] for name in names]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=fast)


@pytest.mark.parametrize("trained", NAMES)
def test_moe_mlp_frozen_but_one(trained):
    arguments = sample(5, 3, 2, biased=True, dtype=torch.float64)
    value = arguments[trained].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: moe_mlp(**{**arguments, trained: v}), value)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_moe_mlp_opcheck(overload, requires_grad):
    op = getattr(torch.ops.unimoe.moe_mlp, overload)
    for biased, num_tokens in ((False, 5), (True, 0)):
        arguments = sample(num_tokens, 6, 4, held=3, biased=biased)
        arguments = with_grad(arguments) if requires_grad else arguments
        names = ("x", "gate_up_proj", "down_proj", "ids", "scores", "gate_up_bias", "down_bias")
        inputs = [arguments[name] for name in names]
        torch.library.opcheck(op, (*inputs, "silu", 7.0, 1.702, requires_grad))


def test_moe_mlp_opcheck_backward(overload):
    arguments = sample(5, 6, 4, held=3, biased=True)
    names = ("x", "gate_up_proj", "down_proj", "ids", "scores", "gate_up_bias", "down_bias")
    inputs = [arguments[name] for name in names]
    gate = ("silu", 7.0, 1.702)
    _, *saved = getattr(torch.ops.unimoe.moe_mlp, overload)(*inputs, *gate, True)
    x, gate_up_proj, down_proj, _, scores, _, down_bias = inputs
    backward = getattr(torch.ops.unimoe.moe_mlp_backward, overload)
    for needs in ([True] * 6, [True, False, False, True, False, False]):
        given = (torch.randn(5, 6), x, gate_up_proj, down_proj, scores, *saved, down_bias)
        torch.library.opcheck(backward, (*given, *gate, needs))


@settings(max_examples=15)
@given(
    num_tokens=st.integers(0, 33),
    num_experts=st.integers(1, 6),
    d=st.sampled_from([1, 5, 16]),
    f=st.sampled_from([1, 7, 8]),
    kind=st.sampled_from(ROUTINGS),
    biased=st.booleans(),
    data=st.data(),
)
def test_moe_mlp_any_shape(num_tokens, num_experts, d, f, kind, biased, data):
    top_k = data.draw(st.integers(1, num_experts))
    held = data.draw(st.integers(1, num_experts))
    arguments = with_grad(
        sample(num_tokens, d, f, num_experts, top_k, kind, held, biased, torch.float64)
    )
    grad = torch.randn(num_tokens, d)
    expected = run(mlp_by_hand, with_grad(arguments), grad, activation="silu")
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            actual = run(moe_mlp, arguments, grad)
        for value, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


def test_moe_mlp_takes_any_layout(backend, layout):
    arguments = sample(device=backend.device)
    expected = moe_mlp(**arguments)
    turned = {
        "x": layout(arguments["x"]),
        "ids": layout(arguments["ids"]).long(),
        "scores": layout(arguments["scores"]),
        "gate_up_proj": arguments["gate_up_proj"].transpose(1, 2).contiguous().transpose(1, 2),
        "down_proj": arguments["down_proj"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    torch.testing.assert_close(moe_mlp(**{**arguments, **turned}), expected)


def test_moe_mlp_takes_one_expert_twice(backend):
    arguments = with_grad(sample(dtype=torch.float64, device=backend.device))
    arguments["ids"] = torch.full_like(arguments["ids"], 2)
    grad = torch.randn(9, 24)
    actual = run(moe_mlp, arguments, grad.to(backend.device))
    expected = run(mlp_by_hand, with_grad(arguments), grad.to(backend.device), activation="silu")
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moe_mlp_keeps_little_for_the_backward(dtype):
    arguments = with_grad(sample(num_tokens=20, biased=True, dtype=dtype))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t
    ):
        moe_mlp(**arguments)
    weights = {
        arguments[name].data_ptr()
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    }
    size, t, d, f, e, k = dtype.itemsize, 20, 24, 16, 4, 2
    held = sum(tensor.nbytes for address, tensor in kept.items() if address not in weights)
    assert held <= size * (t * d + 2 * t * k * f) + 16 * t * k + 8 * (e + 1)


def test_moe_mlp_is_deterministic(backend):
    arguments = with_grad(sample(device=backend.device))
    grad = torch.randn(9, 24, device=backend.device)
    first, second = run(moe_mlp, arguments, grad), run(moe_mlp, arguments, grad)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moe_mlp_has_second_derivatives_in_16_bits(dtype):
    arguments = sample(num_tokens=20, biased=True, dtype=dtype)
    found = []
    for options in ({}, {"dtype": torch.float64}):
        own = with_grad(arguments, **options)
        inputs = [own[name] for name in NAMES]
        y = moe_mlp(**own)
        once = torch.autograd.grad(y.square().mean(), inputs, create_graph=True)
        penalty = sum(grad.to(torch.float64).square().sum() for grad in once)
        found.append(torch.autograd.grad(penalty, inputs))
    for name, own, exact in zip(NAMES, *found, strict=True):
        assert exact.norm() > 1e-3, name
        assert relative_error(own, exact) < 0.05, name


def test_moe_mlp_backward_runs_twice_and_under_checkpointing(backend):
    arguments = with_grad(sample(biased=True, device=backend.device))
    grad = torch.randn(9, 24, device=backend.device)
    y, *expected = run(moe_mlp, arguments, grad)
    again = checkpoint(lambda: moe_mlp(**arguments), use_reentrant=False)
    assert again.equal(y)
    inputs = [arguments[name] for name in NAMES]
    for retain in (True, False):
        grads = torch.autograd.grad(again, inputs, grad, retain_graph=retain)
        assert all(a.equal(b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 4, 2), (1, 4, 2), (5, 1, 1), (5, 4, 4)],
    ids=["T=0", "T=1", "E=1", "K=E"],
)
def test_moe_mlp_edge(backend, num_tokens, num_experts, top_k):
    arguments = with_grad(
        sample(num_tokens, 5, 3, num_experts, top_k, dtype=torch.float64, device=backend.device)
    )
    grad = torch.randn(num_tokens, 5, device=backend.device)
    actual = run(moe_mlp, arguments, grad)
    expected = run(mlp_by_hand, with_grad(arguments), grad, activation="silu")
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact)


def test_moe_mlp_uses_nothing_of_another_ranks_rows(backend):
    arguments = with_grad(sample(biased=True, device=backend.device))
    arguments["ids"][:, 1] = 4
    nan = arguments["scores"].detach().clone()
    nan[:, 1] = float("nan")
    arguments["scores"] = nan.requires_grad_()
    grad = torch.randn(9, 24, device=backend.device)
    actual = run(moe_mlp, arguments, grad)
    only = {"ids": arguments["ids"][:, :1], "scores": nan[:, :1].detach().requires_grad_()}
    expected = list(run(moe_mlp, {**arguments, **only}, grad))
    scores_at = 1 + NAMES.index("scores")
    expected[scores_at] = torch.nn.functional.pad(expected[scores_at], (0, 1))
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact)


def test_moe_mlp_all_rows_of_another_rank(backend):
    arguments = with_grad(sample(biased=True, device=backend.device))
    arguments["ids"] = torch.full_like(arguments["ids"], 4)
    values = run(moe_mlp, arguments, torch.ones(9, 24, device=backend.device))
    assert not any(value.any() for value in values)


@pytest.mark.parametrize("beyond", [4, -1, 2**31, 2**32, -(2**32), 2**40 + 1])
def test_moe_mlp_drops_choices_of_no_expert_here(backend, beyond):
    arguments = with_grad(sample(device=backend.device))
    ids = arguments["ids"].long()
    grad = torch.randn(9, 24, device=backend.device)
    values = []
    for outside in (4, beyond):
        ids[::2, 1] = outside
        values.append(run(moe_mlp, {**arguments, "ids": ids}, grad))
    assert all(a.equal(b) for a, b in zip(*values, strict=True))


def test_moe_mlp_checks_ids_when_asked(monkeypatch):
    arguments = sample()
    arguments["ids"][3, 1] = -3
    moe_mlp(**arguments)
    monkeypatch.setattr(_checks, "VALUE_CHECKS", True)
    with pytest.raises(ValueError, match=r"ids \(minimum -3\) must not be negative"):
        moe_mlp(**arguments)


def test_moe_mlp_rejects_bad_arguments():
    arguments = sample(biased=True)
    for name, bad, message in (
        ("x", lambda v: v[0], r"x \(shape \(24,\)\) must have shape \[T, D\]"),
        ("gate_up_proj", lambda v: v[:, 1:], r"gate_up_proj \(shape \(4, 31, 24\)\) must have an"),
        (
            "gate_up_proj",
            lambda v: v[:, :, 1:],
            r"gate_up_proj .* must have size 24 in dimension 2",
        ),
        ("gate_up_proj", lambda v: v[:0], r"E of gate_up_proj \(0\) must be at least 1"),
        ("down_proj", lambda v: v[1:], r"down_proj .* must have size 4 in dimension 0"),
        ("down_proj", lambda v: v[:, 1:], r"down_proj .* must have size 24 in dimension 1"),
        ("down_proj", lambda v: v[:, :, 1:], r"down_proj .* must have size 16 in dimension 2"),
        ("ids", lambda v: v[1:], r"ids \(shape \(8, 2\)\) must have size 9 in dimension 0"),
        ("ids", lambda v: v[:, :0], r"K of ids \(0\) must be at least 1"),
        (
            "scores",
            lambda v: v[:, 1:],
            r"scores \(shape \(9, 1\)\) must have size 2 in dimension 1",
        ),
        ("scores", lambda v: v.to("meta"), r"scores \(on meta\) must be on the device of x"),
        ("gate_up_bias", lambda v: v[:, 1:], r"gate_up_bias .* must have size 32 in dimension 1"),
        ("down_bias", lambda v: v[1:], r"down_bias .* must have size 4 in dimension 0"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_mlp(**{**arguments, name: bad(arguments[name])})
    for name, bad in (("ids", torch.float32), ("x", torch.int64), ("down_proj", torch.float64)):
        with pytest.raises(TypeError, match=name):
            moe_mlp(**{**arguments, name: arguments[name].to(bad)})
    with pytest.raises(ValueError, match=r"activation \('tanh'\) must be one of silu"):
        moe_mlp(**arguments, activation="tanh")
