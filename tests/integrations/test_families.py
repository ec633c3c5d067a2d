"""Every family of the installed transformers whose experts can be chosen, beside its own eager."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, SIZES_ARE_FOR, experts_of, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

import unimoe_kernels
import unimoe_kernels.integrations.transformers as seam
from unimoe_kernels.testing import relative_error

unimoe_kernels.register_with_transformers()
# What transformers calls the cache of keys and values from 5.24 on, and before.
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


class OperatorCalls(TorchDispatchMode):
    """Counts calls of our operators that reach the dispatcher, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "unimoe":
            self.names[name.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def output(model, ids, **kwargs):
    # The talker of Qwen3-Omni is given embeddings.
    codec = getattr(model, "codec_embedding", None)
    inputs = {"input_ids": ids} if codec is None else {"inputs_embeds": codec(ids)}
    out = model(**inputs, **kwargs)
    if "use_cache" in kwargs:
        return out
    return out.logits if hasattr(out, "logits") else out[0]


def run(model, implementation):
    """Output, gradients of all parameters, and calls of our operators in both passes."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    with OperatorCalls() as forward:
        y = output(model, IDS)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    with OperatorCalls() as backward:
        y.backward(grad)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads, forward.names, backward.names


def zeros_of(function):
    return lambda *args, **kwargs: torch.zeros_like(function(*args, **kwargs))


@every_family
def test_model_answers_and_learns_as_on_eager(family, monkeypatch):
    model = tiny_model(family)
    expected, expected_grads, *none = run(model, "eager")
    assert none == [Counter(), Counter()]
    y, grads, forward, backward = run(model, "unimoe")
    assert 0.01 < expected.std() < 100
    assert relative_error(y, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    experts = [name for name in grads if ".experts." in name]
    assert any(name.endswith("down_proj") for name in experts)
    far = []
    for name, grad in expected_grads.items():
        if grad.abs().max() > 1e-5:
            if relative_error(grads[name], grad) >= 1e-4:
                far.append(name)
        else:
            # Of a router whose scores do not depend on it, rounding is all there is.
            assert grads[name].abs().max() < 2e-5, name
    if far:
        # What is left of a sum that cancels is mostly rounding, in eager's own gradient as well.
        _, exact, *_ = run(copy.deepcopy(model).double(), "eager")
        for name in far:
            eager_error = relative_error(expected_grads[name], exact[name])
            assert eager_error > 1e-4, name
            assert relative_error(grads[name], exact[name]) < 2 * eager_error, name
    assert all(expected_grads[name].abs().max() > 1e-6 for name in experts)
    op = "moe_mlp" if "moe_mlp" in forward else "grouped_mm"
    assert forward[op] > 0
    assert any(name.startswith(op) for name in backward)

    monkeypatch.setattr(seam, "run_experts", zeros_of(seam.run_experts))
    with torch.no_grad():
        assert relative_error(output(model, IDS), expected) > 1e-3


@every_family
def test_cached_step(family):
    model = tiny_model(family)
    steps = {}
    for implementation in ("eager", "unimoe"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            first = output(model, IDS[:, :-1], use_cache=True)
            cache = getattr(first, CACHE, None)
            if cache is None:
                pytest.skip("keeps no cache")
            steps[implementation] = output(model, IDS[:, -1:], **{CACHE: cache})
    assert relative_error(steps["unimoe"], steps["eager"]) < 1e-5


def first_call(model, family):
    """The first experts module, and what the model gave it on its eager way."""
    experts, calls = experts_of(model, family), []
    hook = experts.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        output(model, IDS)
    hook.remove()
    return experts, calls[0]


def answers(model, experts, implementation, inputs):
    """Output of the experts on their own, and all gradients."""
    model.set_experts_implementation(implementation)
    x, ids, scores = inputs
    experts.zero_grad()
    leaves = x.detach().requires_grad_(), scores.detach().requires_grad_()
    y = experts(leaves[0], ids, leaves[1])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(grad)
    weights = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaves[0].grad, "scores": leaves[1].grad} | weights


def assert_same(model, experts, inputs):
    expected = answers(model, experts, "eager", inputs)
    actual = answers(model, experts, "unimoe", inputs)
    assert actual.keys() == expected.keys()
    assert expected["y"].abs().max() > 1e-2
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert relative_error(actual[name], value) < (1e-5 if name == "y" else 1e-4), name


@every_family
def test_experts_on_unusual_inputs(family):
    model = tiny_model(family)
    experts, (x, ids, scores) = first_call(model, family)
    tokens, width = x.shape
    top_k = ids.shape[1]
    # Experts that nobody chooses.
    few = torch.arange(top_k).to(ids).expand(tokens, -1)
    assert_same(model, experts, (x, few, scores))
    # One token; strided tokens, ids and scores.
    assert_same(model, experts, (x[:1], ids[:1], scores[:1]))
    wide = torch.stack([x, torch.full_like(x, torch.nan)], dim=2).flatten(1)
    assert_same(model, experts, (wide[:, ::2], ids, scores))
    assert_same(model, experts, (x.t().contiguous().t(), ids.t().contiguous().t(), scores))
    # No token.
    model.set_experts_implementation("unimoe")
    y = experts(x[:0], ids[:0], scores[:0])
    assert y.shape == (0, width)
    assert y.dtype == x.dtype
    # Frozen experts pass gradients on.
    experts.requires_grad_(False)
    assert_same(model, experts, (x, ids, scores))
    experts.requires_grad_(True)


@every_family
def test_odd_sizes(family):
    sizes = {"intermediate_size": 21, "moe_intermediate_size": 13}
    model = tiny_model(family, **sizes)
    experts, inputs = first_call(model, family)
    assert any(size % 2 for size in (*experts.down_proj.shape[1:],))
    assert_same(model, experts, inputs)


def mean_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def many_tokens(experts, top_k, scores):
    """Inputs of 256 tokens, so that one unlucky number does not decide."""
    generator = torch.Generator().manual_seed(4)
    num_experts, width = experts.num_experts, model_width(experts)
    x = torch.randn(256, width, generator=generator)
    best, ids = torch.rand(256, num_experts, generator=generator).topk(top_k)
    return x, ids, best.softmax(-1).to(scores.dtype)


def model_width(experts):
    return experts.down_proj.shape[2 if experts.is_transposed else 1]


@every_family
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_short_dtypes_lose_no_more_than_elsewhere(family, way):
    model = tiny_model(family)
    experts, (_, ids, scores) = first_call(model, family)
    x, ids, scores = many_tokens(experts, ids.shape[1], scores)
    if way == "bfloat16":
        model.to(torch.bfloat16)
        x = x.bfloat16()
    wide = copy.deepcopy(experts).double()
    wide.config = copy.deepcopy(experts.config)
    wide.config._experts_implementation = "eager"
    errors, dtypes = {}, {}
    with torch.no_grad():
        exact = wide(x.double(), ids, scores.double())
        for implementation in ("eager", "grouped_mm", "unimoe"):
            model.set_experts_implementation(implementation)
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                y = experts(x, ids, scores)
            errors[implementation], dtypes[implementation] = mean_error(y, exact), y.dtype
    assert dtypes["unimoe"] == dtypes["eager"]
    if way == "bfloat16":
        assert 1e-5 < errors["unimoe"] < 1.02 * min(errors["eager"], errors["grouped_mm"])
    else:
        # grouped_mm takes no part in autocast and stays in float32. Eager adds up the experts'
        # answers in the dtype of x; ours are added up in float32 too and then rounded, once.
        assert 1e-5 < errors["unimoe"] < 1.15 * errors["eager"]


def test_all_families_were_found():
    assert len({family.experts_name for family in FAMILIES}) == len(FAMILIES)
    if transformers.__version__.startswith(SIZES_ARE_FOR):
        assert len(FAMILIES) == 68


@pytest.mark.skipif(not PAGE.exists(), reason="tests without the checkout")
def test_page_lists_all_families():
    text = PAGE.read_text(encoding="utf-8")
    assert {family.folder for family in FAMILIES} <= set(re.findall(r"`(\w+)`", text))
