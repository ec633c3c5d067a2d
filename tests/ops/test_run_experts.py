"""Experts with activations and corrections that `moe_mlp` does not have, beside a loop."""

import pytest
import torch

from unimoe_kernels import swiglu
from unimoe_kernels.ops import ExpertWeights, run_experts
from unimoe_kernels.testing import relative_error

T, K, E, D, F = 9, 2, 4, 6, 10


def inputs(gated=True, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    width = 2 * F if gated else F
    weights = ExpertWeights(
        randn(E, width, D) * D**-0.5,
        randn(E, D, F) * F**-0.5,
        randn(E, width) if bias else None,
        randn(E, D) if bias else None,
    )
    ids = torch.randint(0, E + 2, (T, K), generator=generator)
    ids[0] = E
    return randn(T, D), ids, randn(T, K).abs(), weights


def looped(x, ids, scores, weights, activate, after_first=None, after_down=None):
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e < E:
                hidden = weights.first[e] @ x[t]
                hidden = hidden if weights.first_bias is None else hidden + weights.first_bias[e]
                hidden = hidden if after_first is None else after_first(hidden, x[t], e)
                act = activate(hidden.unsqueeze(0)).squeeze(0)
                out = weights.down[e] @ act
                out = out if weights.down_bias is None else out + weights.down_bias[e]
                out = out if after_down is None else after_down(out, act, e)
                y[t] = y[t] + scores[t, k] * out
    return y


def softsign_gate(hidden):
    up, gate = hidden.chunk(2, dim=-1)
    return torch.nn.functional.softsign(gate) * up


def with_gradients(function, x, scores, weights):
    leaves = [t.clone().requires_grad_() for t in (x, scores, *weights) if t is not None]
    rebuilt = iter(leaves[2:])
    own = ExpertWeights(*(None if w is None else next(rebuilt) for w in weights))
    y = function(leaves[0], leaves[1], own)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad(y, leaves, grad)


CASES = {
    "named": (True, "gelu", lambda h: swiglu(h, "gelu")),
    "own gate": (True, softsign_gate, softsign_gate),
    "no gate": (False, torch.tanh, torch.tanh),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_with_gradients(name, corrected, bias):
    gated, activation, activate = CASES[name]
    x, ids, scores, weights = inputs(gated, bias)
    # Of expert e: the product times e + 1, and the input's sum added.
    per_expert = torch.arange(1, E + 1, dtype=torch.float64)

    def of_rows(offsets, like):
        sizes = torch.cat([offsets.diff().long(), like.shape[0] - offsets[-1:].long()])
        factor = torch.cat([per_expert, per_expert.new_zeros(1)])
        return factor.repeat_interleave(sizes).unsqueeze(1)

    def correct(product, rows, offsets):
        return product * of_rows(offsets, product) + rows.sum(1, keepdim=True)

    def correct_one(product, row, e):
        return product * per_expert[e] + row.sum()

    options = {"correct_first": correct, "correct_down": correct} if corrected else {}
    ours = with_gradients(
        lambda x, scores, weights: run_experts(x, ids, scores, weights, activation, **options),
        *(x, scores, weights),
    )
    after = (correct_one, correct_one) if corrected else (None, None)
    expected = with_gradients(
        lambda x, scores, weights: looped(x, ids, scores, weights, activate, *after),
        *(x, scores, weights),
    )
    assert 0.1 < expected[0].std() < 500
    for actual, wanted in zip(ours, expected, strict=True):
        assert wanted.abs().max() > 1e-3
        assert relative_error(actual, wanted) < 1e-12
    assert not ours[0][0].any()


def test_strides_int64_ids_and_empty_inputs():
    x, ids, scores, weights = inputs()
    expected = run_experts(x, ids, scores, weights, softsign_gate)
    turned = ExpertWeights(weights.first.transpose(1, 2).contiguous().transpose(1, 2), *weights[1:])
    actual = run_experts(
        x.t().contiguous().t(), ids.t().contiguous().t(), scores, turned, softsign_gate
    )
    assert relative_error(actual, expected) < 1e-13
    huge = torch.where(ids >= E, ids + 2**32, ids)
    assert torch.equal(run_experts(x, huge, scores, weights, softsign_gate), expected)
    assert run_experts(x[:0], ids[:0], scores[:0], weights, softsign_gate).shape == (0, D)


def test_autocast_multiplies_in_its_dtype():
    x, ids, scores, weights = inputs(dtype=torch.float32)
    seen = []

    def activation(hidden):
        seen.append(hidden.dtype)
        return softsign_gate(hidden)

    exact = run_experts(x, ids, scores, weights, activation)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, ids, scores, weights, activation)
    assert seen == [torch.float32, torch.bfloat16]
    assert y.dtype == torch.bfloat16
    assert 1e-4 < relative_error(y, exact) < 3e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(T, D + 1, dtype=torch.float64)}, r"weights.first \(shape .*size 7"),
        ({"ids": torch.zeros(T + 1, K, dtype=torch.int32)}, r"ids \(shape \(10, 2\)\).*T of x"),
        ({"activation": lambda h: h}, r"weights.down \(shape .*size 20.*F of the activation"),
        ({"activation": "swish"}, r"activation \('swish'\) must be one of"),
    ],
)
def test_rejects(change, message):
    x, ids, scores, weights = inputs()
    arguments = {"x": x, "ids": ids, "scores": scores, "weights": weights}
    arguments |= {"activation": softsign_gate} | change
    with pytest.raises(ValueError, match=message):
        run_experts(**arguments)
