import copy
import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import unimoe_kernels
import unimoe_kernels.integrations.transformers as seam
from unimoe_kernels import _extension
from unimoe_kernels.ops.moe_mlp import packed
from unimoe_kernels.testing import relative_error

unimoe_kernels.register_with_transformers()

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
}


def build(name, implementation):
    """A tiny model of random weights, the same at every call, with experts that matter."""
    config_class, options = CONFIGS[name]
    config = getattr(transformers, config_class)(**TINY, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_models_give_the_same_logits_and_gradients_as_eager(name, monkeypatch):
    # gpt-oss has a gate of its own; all others are one operator a layer.
    way = "run_pipeline" if name == "gpt_oss" else "moe_mlp"
    calls = []
    home = importlib.import_module("unimoe_kernels.ops.moe_mlp.run_experts")
    run = getattr(home, way)
    monkeypatch.setattr(home, way, lambda *args, **kw: calls.append(way) or run(*args, **kw))
    input_ids = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    logits, grads = {}, {}
    for implementation in ("eager", "unimoe"):
        model = build(name, implementation)
        assert model.config._experts_implementation == implementation
        out = model(input_ids, labels=input_ids)
        out.loss.backward()
        logits[implementation] = out.logits
        grads[implementation] = {
            k: p.grad for k, p in model.named_parameters() if p.grad is not None
        }
        assert len(calls) == (TINY["num_hidden_layers"] if implementation == "unimoe" else 0)
    assert 0.1 < logits["eager"].std() < 10
    assert relative_error(logits["unimoe"], logits["eager"]) < 1e-5
    assert grads["unimoe"].keys() == grads["eager"].keys()
    assert any("experts" in key for key in grads["eager"])
    for key, expected in grads["eager"].items():
        assert expected.abs().max() > 1e-6, key
        assert relative_error(grads["unimoe"][key], expected) < 1e-4, key


def test_saved_model_loads_with_unimoe_and_switches(tmp_path):
    model = build("mixtral", "eager").eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="unimoe"
    ).eval()
    input_ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids).logits
        actual = loaded(input_ids).logits
        model.set_experts_implementation("unimoe")
        switched = model(input_ids).logits
        generated = loaded.generate(input_ids, max_new_tokens=4, do_sample=False)
        model.set_experts_implementation("eager")
        expected_tokens = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(switched, expected) < 1e-5
    assert torch.equal(generated, expected_tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_nothing(name):
    model = build(name, "unimoe").train()
    input_ids = torch.arange(3, 20)[None]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_models_compile_as_one_graph(name):
    model = build(name, "unimoe").eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input_ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert relative_error(compiled(input_ids).logits, model(input_ids).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_may_lie_anywhere_in_a_file(dtype):
    # What safetensors maps starts wherever the header ends.
    model = build("mixtral", "unimoe").to(dtype).eval()
    input_ids = torch.arange(3, 20)[None]
    size = dtype.itemsize
    with torch.no_grad():
        expected = model(input_ids).logits
        for parameter in model.parameters():
            space = torch.empty(parameter.numel() * size + 64, dtype=torch.uint8)
            start = -space.data_ptr() % 64 + size
            place = space[start : start + parameter.numel() * size].view(dtype)
            assert place.data_ptr() % 16 == size % 16
            parameter.data = place.view_as(parameter).copy_(parameter)
        assert torch.equal(model(input_ids).logits, expected)


def test_registering_twice_changes_nothing():
    before = ALL_EXPERTS_FUNCTIONS["unimoe"]
    unimoe_kernels.register_with_transformers()
    assert ALL_EXPERTS_FUNCTIONS["unimoe"] is before


def test_old_transformers_is_refused(monkeypatch):
    # transformers puts a new module object under its name when it loads a model.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.1")
    with pytest.raises(ImportError, match=r"transformers is 5\.16\.1, it must be at least 5\.17"):
        unimoe_kernels.register_with_transformers()


class Experts(nn.Module):
    """An experts module with every layout that transformers' decorator knows."""

    def __init__(self, config, flags, act):
        super().__init__()
        E, D, F = self.num_experts, self.D, self.F = 3, 6, 10
        first = 2 * F if flags.get("has_gate", True) else F
        name = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
        shapes = {name: (first, D), "down_proj": (D, F)}
        for key, (rows, columns) in shapes.items():
            shape = (E, columns, rows) if flags.get("is_transposed") else (E, rows, columns)
            self.register_parameter(key, nn.Parameter(torch.randn(shape) / 2))
            if flags.get("has_bias"):
                self.register_parameter(f"{key}_bias", nn.Parameter(torch.randn(E, rows)))
        if flags.get("has_post_expert_norm"):
            self.post_expert_norm = nn.RMSNorm(D)
        self.act_fn = act

    def forward(self, x, ids, scores):
        y = []
        for x_D, ids_K, scores_K in zip(x, ids.tolist(), scores, strict=True):
            y_D = torch.zeros_like(x_D)
            for e, score in zip(ids_K, scores_K, strict=True):
                if e < self.num_experts:
                    y_D = y_D + score * self.one(x_D[None], e)[0]
            y.append(y_D)
        return torch.stack(y)

    def one(self, x, e):
        hidden = self.linear(x, "gate_up_proj" if self.has_gate else "up_proj", e)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        out = self.linear(hidden, "down_proj", e)
        return self.post_expert_norm(out) if hasattr(self, "post_expert_norm") else out

    def linear(self, x, name, e):
        weight = getattr(self, name)[e]
        out = x @ weight if self.is_transposed else x @ weight.T
        return out + getattr(self, f"{name}_bias")[e] if self.has_bias else out


def make_experts(flags, act, *, gate=None, implementation="unimoe"):
    for flag in flags:
        if flag not in inspect.signature(use_experts_implementation).parameters:
            pytest.skip(f"transformers {transformers.__version__} has no {flag}")
    kind = type("DecoratedExperts", (Experts,), {"_apply_gate": gate} if gate else {})
    kind = use_experts_implementation(kind, **flags)
    torch.manual_seed(0)
    return kind(SimpleNamespace(_experts_implementation=implementation), flags, act).double()


def interleaved_gate(self, hidden):
    return hidden[..., ::2].clamp(max=1.0) * torch.sigmoid(hidden[..., 1::2])


VARIANTS = {
    "silu": ({}, nn.SiLU(), None),
    "silu of transformers": ({}, ACT2FN["silu"], None),
    "gelu": ({}, ACT2FN["gelu"], None),
    "gelu tanh": ({}, ACT2FN["gelu_pytorch_tanh"], None),
    "relu": ({}, nn.ReLU(), None),
    "tanh": ({}, nn.Tanh(), None),
    "bias": ({"has_bias": True}, nn.SiLU(), None),
    "transposed": ({"is_transposed": True}, nn.SiLU(), None),
    "transposed bias": ({"is_transposed": True, "has_bias": True}, nn.SiLU(), None),
    "own gate": ({"is_concatenated": False, "has_bias": True}, nn.SiLU(), interleaved_gate),
    "own gate transposed": ({"is_transposed": True, "has_bias": True}, None, interleaved_gate),
    "no gate": ({"has_gate": False}, nn.ReLU(), None),
    "post norm": ({"has_post_expert_norm": True}, nn.SiLU(), None),
}


@pytest.mark.parametrize("sentinels", [False, True], ids=["", "sentinels"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_of_experts(variant, sentinels):
    flags, act, gate = VARIANTS[variant]
    ours = make_experts(flags, act, gate=gate)
    eager = copy.deepcopy(ours)
    eager.config = SimpleNamespace(_experts_implementation="eager")
    torch.manual_seed(1)
    scores, ids = torch.rand(8, 3, dtype=torch.float64).topk(2)
    if sentinels:
        ours._is_expert_parallel = eager._is_expert_parallel = True
        ids[2, 0] = ids[5, 1] = ids[6, 0] = ids[6, 1] = 3
    x, grad = torch.randn(2, 8, 6, dtype=torch.float64)
    results = []
    for experts in (ours, eager):
        inputs = (x.clone().requires_grad_(), scores.clone().requires_grad_())
        y = experts(inputs[0], ids, inputs[1])
        y.backward(grad)
        grads = {name: p.grad for name, p in experts.named_parameters()}
        results.append({"y": y, "x": inputs[0].grad, "scores": inputs[1].grad} | grads)
    actual, expected = results
    for name in expected:
        assert expected[name].abs().max() > 0.05, name
        assert relative_error(actual[name], expected[name]) < 1e-12, name


def test_layouts_of_a_newer_transformers_are_refused(monkeypatch):
    experts = make_experts({}, nn.SiLU())
    inputs = torch.randn(2, 6).double(), torch.tensor([[0], [2]]), torch.ones(2, 1).double()
    expected = experts(*inputs)
    monkeypatch.setattr(seam, "_unknown_layout", {"has_scales": False})
    assert torch.equal(experts(*inputs), expected)
    experts.has_scales = True
    with pytest.raises(NotImplementedError, match="DecoratedExperts has has_scales=True"):
        experts(*inputs)


def test_this_transformers_has_no_unknown_layouts():
    assert not seam._unknown_layout


@pytest.mark.parametrize("variant", ["silu", "own gate", "post norm"])
def test_no_tokens(variant):
    flags, act, gate = VARIANTS[variant]
    experts = make_experts(flags, act, gate=gate)
    ids = torch.empty(0, 2, dtype=torch.int64)
    y = experts(torch.empty(0, 6, dtype=torch.float64), ids, torch.empty(0, 2).double())
    assert y.shape == (0, 6)


@pytest.mark.parametrize("variant", ["silu", "own gate"])
def test_autocast_keeps_the_dtype_of_the_host(variant):
    flags, act, gate = VARIANTS[variant]
    experts = make_experts(flags, act, gate=gate).float()
    ids = torch.tensor([[0, 1], [2, 0], [1, 1]])
    x, scores = torch.randn(3, 6), torch.rand(3, 2)
    expected = experts(x, ids, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, ids, scores.bfloat16())
    assert y.dtype == torch.float32
    assert 0 < relative_error(y, expected) < 3e-2


@pytest.mark.parametrize("variant", ["silu", "own gate"])
def test_compiles_as_one_graph(variant):
    flags, act, gate = VARIANTS[variant]
    experts = make_experts(flags, act, gate=gate)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]])
    x, scores = torch.randn(3, 6).double(), torch.rand(3, 2).double()
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert relative_error(compiled(x, ids, scores), experts(x, ids, scores)) < 1e-13


@pytest.mark.skipif(not _extension.loaded, reason="needs the C++ extension")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_packed_weights_serve_whole_models(name):
    model = build(name, "unimoe")
    ids = torch.randint(3, 40, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
        unimoe_kernels.pack_weights(model)
        assert torch.equal(model(ids).logits, expected)
        for gate_up, down in (
            (part.gate_up_proj, part.down_proj)
            for part in model.modules()
            if hasattr(part, "gate_up_proj") and hasattr(part, "down_proj")
        ):
            for panels in packed.panels_of(gate_up, down):
                panels.zero_()
        assert not torch.equal(model(ids).logits, expected)
    unimoe_kernels.unpack_weights(model)
