import pytest
import torch

from unimoe_kernels import (
    dequantize_weight,
    moe_mlp,
    moe_mlp_quantized,
    quantize_weight,
    use_backend,
)
from unimoe_kernels.testing import (
    ROUTINGS,
    assert_close_to_float64,
    relative_error,
    sample_routing,
)

OP = "moe_mlp_quantized"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = {
    "int8": ("int8", None, {}),
    "int8-32": ("int8", 32, {}),
    "int4-64": ("int4", 64, {}),
    "int4-32-zeros": ("int4", 32, {"zero_points": True}),
}
T, D, F, E, K = 9, 128, 64, 4, 2


def sample(format="int4-64", dtype=torch.float32, device="cpu", routing="uniform", tokens=T):
    """x, both weights, ids, scores and both biases."""
    name, group_size, options = FORMATS[format]
    shapes = ((E, 2 * F, D), (E, D, F))
    weights = [
        quantize_weight(
            (torch.randn(shape) / shape[2] ** 0.5).to(device, dtype), name, group_size, **options
        )
        for shape in shapes
    ]
    ids, scores = sample_routing(routing, tokens, K, E, device=device)
    if tokens:
        ids[-1, -1] = E
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    biases = [torch.randn(E, width).to(device, dtype) for width in (2 * F, D)]
    x = torch.randn(tokens, D).to(device, dtype)
    return x, *weights, ids, scores.to(wide), biases


def in_float64(x, first, down, ids, scores, biases=(None, None), **options):
    """`moe_mlp` of the same numbers; its own tests show it to be right."""
    weights = [dequantize_weight(weight, torch.float64) for weight in (first, down)]
    first_bias, down_bias = (None if bias is None else bias.double() for bias in biases)
    with use_backend("reference"):
        return moe_mlp(
            x.double(),
            *weights,
            ids,
            scores.double(),
            gate_up_bias=first_bias,
            down_bias=down_bias,
            **options,
        )


def assert_close(dtype, actual, expected, baseline, name):
    """In float64 the reference adds up as `expected` does, and says nothing of the error."""
    if dtype == torch.float64:
        assert relative_error(actual, expected) < 1e-13, name
    else:
        assert_close_to_float64(actual, expected, baseline, name, dtype)


def test_moe_mlp_quantized_example(backend):
    gate_up_proj, down_proj = torch.randn(2, 6, 64) / 8, torch.randn(2, 64, 3) / 2
    x, (ids, scores) = torch.randn(5, 64), sample_routing("uniform", 5, 2, 2)
    to = {"device": backend.device}
    first, down = (quantize_weight(w.to(**to), "int8") for w in (gate_up_proj, down_proj))
    y = moe_mlp_quantized(x.to(**to), first, down, ids.to(**to), scores.to(**to))
    floats = (dequantize_weight(weight, x.dtype) for weight in (first, down))
    torch.testing.assert_close(y, moe_mlp(x.to(**to), *floats, ids.to(**to), scores.to(**to)))
    exact = moe_mlp(*(v.to(**to) for v in (x, gate_up_proj, down_proj, ids, scores)))
    assert 1e-4 < relative_error(y, exact.double()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, T, 50])
def test_moe_mlp_quantized_matches_float64(backend, format, dtype, tokens):
    if backend.interpreted and (tokens > 1 or dtype != torch.float32):
        pytest.skip("takes long in the interpreter")
    x, first, down, ids, scores, biases = sample(format, dtype, backend.device, tokens=tokens)
    inputs = [value.requires_grad_() for value in (x, scores, *biases)]
    grad = torch.randn_like(x)

    def run():
        y = moe_mlp_quantized(
            x, first, down, ids, scores, gate_up_bias=biases[0], down_bias=biases[1]
        )
        return y, *torch.autograd.grad(y, inputs, grad)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y = in_float64(exact[0], first, down, ids, exact[1], exact[2:])
    expected = y, *torch.autograd.grad(y, exact, grad.double())
    assert actual[0].dtype == dtype
    names = ("y", "grad of x", "grad of scores", "grad of first bias", "grad of second bias")
    for name, *values in zip(names, actual, expected, baseline, strict=True):
        assert_close(dtype, *values, name)
    # Without gradients nothing is kept, and the sums are the same.
    with torch.no_grad():
        alone = moe_mlp_quantized(
            x, first, down, ids, scores, gate_up_bias=biases[0], down_bias=biases[1]
        )
    assert_close_to_float64(alone, y)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "swiglu_clamped"])
def test_every_routing_and_activation(backend, routing, activation):
    if backend.interpreted and (routing, activation) != ("zipf", "silu"):
        pytest.skip("takes long in the interpreter")
    x, first, down, ids, scores, _ = sample(device=backend.device, routing=routing)
    y = moe_mlp_quantized(x, first, down, ids.long(), scores.half(), activation=activation)
    expected = in_float64(x, first, down, ids, scores.half(), activation=activation)
    assert_close_to_float64(y, expected)


def test_no_tokens_and_dropped_choices(backend):
    x, first, down, ids, scores, _ = sample(device=backend.device, tokens=0)
    assert moe_mlp_quantized(x, first, down, ids, scores).shape == (0, D)
    x, first, down, ids, scores, _ = sample(device=backend.device)
    x.requires_grad_()
    y = moe_mlp_quantized(x, first, down, torch.full_like(ids, E), scores)
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_formats_of_both_projections_may_differ(backend):
    x, first, _, ids, scores, _ = sample("int4-64", device=backend.device)
    _, _, down, _, _, _ = sample("int8", device=backend.device)
    y = moe_mlp_quantized(x, first, down, ids, scores)
    assert_close_to_float64(y, in_float64(x, first, down, ids, scores))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradients_that_are_not_asked_for(backend, needs):
    x, first, down, ids, scores, _ = sample(device=backend.device)
    x.requires_grad_(needs[0])
    scores.requires_grad_(needs[1])
    moe_mlp_quantized(x, first, down, ids, scores).square().sum().backward()
    exact = [value.detach().double().requires_grad_() for value in (x, scores)]
    in_float64(exact[0], first, down, ids, exact[1]).square().sum().backward()
    for value, other, needed in zip((x, scores), exact, needs, strict=True):
        if needed:
            assert_close_to_float64(value.grad, other.grad)
        else:
            assert value.grad is None


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4-32-zeros"])
def test_moe_mlp_quantized_opcheck(overload, format, requires_grad):
    if overload == "triton" and format != "int8":
        pytest.skip("takes long in the interpreter")
    x, first, down, ids, scores, biases = sample(format, tokens=1 if overload == "triton" else T)
    for value in (x, scores, *biases):
        value.requires_grad_(requires_grad)
    weights = (*first[:4], *down[:4], *biases)
    op = getattr(torch.ops.unimoe.moe_mlp_quantized, overload)
    forward = (x, ids, scores, *weights, "silu", 7.0, 1.702)
    torch.library.opcheck(op, (*forward, requires_grad))
    if requires_grad:
        return
    _, hidden, *rows = op(*forward, True)
    backward = getattr(torch.ops.unimoe.moe_mlp_quantized_backward, overload)
    for needs in ([True] * 4, [True, False, False, False]):
        saved = (torch.randn_like(x), x, scores, hidden, *rows, *weights)
        torch.library.opcheck(backward, (*saved, "silu", 7.0, 1.702, needs))


def test_moe_mlp_quantized_is_deterministic(backend):
    x, first, down, ids, scores, _ = sample(device=backend.device)
    x.requires_grad_()
    results = []
    for _ in range(2):
        y = moe_mlp_quantized(x, first, down, ids, scores)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_is_kept_for_the_backward():
    x, first, down, ids, scores, _ = sample(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe_mlp_quantized(x.requires_grad_(), first, down, ids, scores)
    weights = {part.data_ptr() for part in (*first[:2], *down[:2])}
    rows = sum(t.nbytes for t in kept if t.data_ptr() not in weights)
    assert rows <= 2 * (T * D + 2 * F * T * K) + 16 * T * K + 8 * (E + 1)


def test_moe_mlp_quantized_rejects_bad_arguments():
    x, first, down, ids, scores, biases = sample()
    floats = torch.randn(E, 2 * F, D)
    with pytest.raises(TypeError, match=r"gate_up_proj \(Tensor\) must be a QuantizedWeight"):
        moe_mlp_quantized(x, floats, down, ids, scores)
    with pytest.raises(TypeError, match=r"gate_up_proj \(QuantizedWeight\) must be a tensor"):
        moe_mlp(x, first, down, ids, scores)
    with pytest.raises(ValueError, match=r"gate_up_proj \(shape \(4, 128, 128\)\) must have size"):
        moe_mlp_quantized(x[:, :64], first, down, ids, scores)
    with pytest.raises(ValueError, match=r"down_proj \(shape \(3, 128, 64\)\) must have size 4"):
        moe_mlp_quantized(x, first, down.of_experts(0, 3), ids, scores)
    with pytest.raises(TypeError, match=r"gate_up_bias \(torch.float64\) must have the dtype of x"):
        moe_mlp_quantized(x, first, down, ids, scores, gate_up_bias=biases[0].double())
    with pytest.raises(ValueError, match=r"activation \('tanh'\) must be one of"):
        moe_mlp_quantized(x, first, down, ids, scores, activation="tanh")
    scales = down.scales.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"down_proj.scales must not require gradients"):
        moe_mlp_quantized(x, first, down._replace(scales=scales), ids, scores)
