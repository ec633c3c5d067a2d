"""Every operator under `torch.compile(fullgraph=True)`, over changing token counts."""

import shutil

import cases
import pytest
import torch

from unimoe_kernels import (
    MoE,
    available_backends,
    expert_sort,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    permute,
    swiglu,
    topk_router,
    unpermute,
    use_backend,
)
from unimoe_kernels.testing import sample_routing

SIZES = cases.Sizes(T=5, D=8, F=6, E=4, K=2, R=3)
_, D, F, E, K, R = SIZES
COUNTS = (5, 7, 2, 33, 64)


def weights():
    """Weights by name, with gradients."""
    shapes = {
        "router": (E, D),
        "gate_up": (E, 2 * F, D),
        "down": (E, D, F),
        "lora_A": (E, R, D),
        "lora_B": (E, 2 * F, R),
    }
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def every_operator(x, w):
    """A layer from single operators, so that each one and its gradient is traced."""
    mask = x[:, 0] > -1
    route = topk_router(x @ w["router"].t(), K, token_mask=mask)
    sort = expert_sort(route.ids, E)
    rows = permute(x, sort, K)
    hidden = grouped_mm(rows, w["gate_up"], sort.expert_offsets)
    hidden = hidden + grouped_lora(rows, w["lora_A"], w["lora_B"], sort.expert_offsets, 0.5)
    rows = grouped_mm(swiglu(hidden), w["down"], sort.expert_offsets)
    y = unpermute(rows, sort, K, route.scores)
    return y, route.load_balancing_loss + route.router_z_loss


def fused(x, w):
    """The same layer without LoRA through `moe_mlp`."""
    route = topk_router(x @ w["router"].t(), K, mode="sigmoid_renorm")
    y = moe_mlp(x, w["gate_up"], w["down"], route.ids, route.scores)
    return y, route.load_balancing_loss + route.router_z_loss


def results(layer, x, w):
    """Output, losses and all gradients."""
    x = x.detach().requires_grad_()
    y, loss = layer(x, w)
    inputs = [x, *w.values()]
    grads = torch.autograd.grad(y.square().sum() + loss, inputs, allow_unused=True)
    return [y, loss, *(grad for grad in grads if grad is not None)]


@pytest.fixture
def compilations():
    """Counts the graphs that are compiled."""
    torch._dynamo.reset()
    counter = []

    def backend(graph, inputs):
        counter.append(graph)
        return graph.forward

    yield counter, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("name", available_backends("moe_mlp", "cpu"))
@pytest.mark.parametrize("layer", [every_operator, fused])
def test_one_recompilation_serves_all_token_counts(layer, name, compilations):
    counter, compiler = compilations
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    w = weights()
    # Triton's interpreter takes milliseconds a row.
    counts = (3, 2, 4) if name == "triton" else COUNTS
    with use_backend(name):
        for num_tokens in counts:
            x = torch.randn(num_tokens, D)
            for actual, expected in zip(results(compiled, x, w), results(layer, x, w), strict=True):
                torch.testing.assert_close(actual, expected)
    assert len(counter) <= 2


def calls():
    """Every call of every operator with every backend; in Triton's interpreter the first alone."""
    for op in cases.operators():
        for index, case in enumerate(cases.cases(op)):
            for name in available_backends(op, "cpu"):
                if name != "triton" or index == 0:
                    yield pytest.param(op, case, name, id=f"{op}-{case.name}-{name}")


def outcome(function, ids, inputs):
    """Outputs, and gradients where there are any."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    result = function(ids, E, *leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    loss = sum(value.square().sum() for value in outputs if value.requires_grad)
    return [*outputs, *(torch.autograd.grad(loss, leaves) if leaves else ())]


def assert_same_compiled(case, compiler):
    """Compares a call with itself as compiled, over token counts of which the last is dynamic."""
    compiled = torch.compile(case.function, fullgraph=True, backend=compiler)
    for num_tokens in (3, 2, 4):
        ids, _ = sample_routing("uniform", num_tokens, K, E)
        ids[-1, -1] = E
        shapes = case.shapes(SIZES._replace(T=num_tokens))
        inputs = [torch.randn(shape) for shape in shapes]
        actual, expected = (outcome(f, ids, inputs) for f in (compiled, case.function))
        for ours, others in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, others)


@pytest.mark.parametrize(("op", "case", "name"), list(calls()))
def test_each_operator_is_traced_for_all_token_counts(op, case, name, compilations):
    counter, compiler = compilations
    with use_backend(name):
        assert_same_compiled(case, compiler)
    assert len(counter) <= 2
    targets = {str(node.target) for graph in counter for node in graph.graph.nodes}
    overload = {"cpp": "default"}.get(name, name)
    assert f"unimoe.{op}.{overload}" in targets


@pytest.mark.parametrize("op", cases.operators())
def test_each_operator_is_traced_forward_and_backward(op, compilations):
    for case in cases.cases(op):
        torch._dynamo.reset()
        assert_same_compiled(case, "aot_eager")


@pytest.mark.parametrize("layer", [every_operator, fused])
def test_forward_and_backward_are_traced(layer, compilations):
    w = weights()
    # The last count is dynamic by then: the backward graph must not depend on it either.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_tokens in COUNTS[:3]:
        x = torch.randn(num_tokens, D)
        for actual, expected in zip(results(compiled, x, w), results(layer, x, w), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
def test_inductor_generates_code_around_the_operators(compilations):
    w = weights()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for num_tokens in COUNTS[:2]:
        x = torch.randn(num_tokens, D)
        for actual, expected in zip(results(compiled, x, w), results(fused, x, w), strict=True):
            torch.testing.assert_close(actual, expected)


def test_layouts_are_normalised_in_the_graph(compilations):
    counter, compiler = compilations
    w = weights()
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    x = torch.randn(D, 9).t()
    for actual, expected in zip(results(compiled, x, w), results(fused, x, w), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(counter) == 1


def test_use_backend_changes_a_compiled_function(compilations):
    counter, compiler = compilations
    sort = expert_sort(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)

    def run(x):
        return permute(x, sort, 2)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    x = torch.randn(2, 3)
    for name in available_backends("permute", "cpu"):
        with use_backend(name):
            assert torch.equal(compiled(x), run(x))
    targets = {node.target for graph in counter for node in graph.graph.nodes}
    assert torch.ops.unimoe.permute.reference in targets
    assert len(counter) == len(available_backends("permute", "cpu"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_holds_the_operators_and_is_saved(tmp_path, training):
    """What autograd is told in Python calls nothing that a file could hold."""
    moe = MoE(D, F, E, K, initializer_range=0.5).requires_grad_(training)
    x = torch.randn(5, D)
    traced = torch.jit.trace(moe, x, check_trace=False)
    traced.save(tmp_path / "moe.pt")
    loaded = torch.jit.load(tmp_path / "moe.pt")
    assert {"unimoe::topk_router", "unimoe::moe_mlp"} <= {
        node.kind() for node in traced.inlined_graph.nodes()
    }
    y = loaded(x)
    assert torch.equal(y, moe(x))
    assert y.abs().max() > 0.01
    if training:
        loaded(x).square().sum().backward()
        grads = [parameter.grad for parameter in loaded.parameters()]
        moe.zero_grad()
        moe(x).square().sum().backward()
        for one, other in zip(grads, moe.parameters(), strict=True):
            assert torch.equal(one, other.grad)
