import pytest
import torch
from tiny_causal import tiny_causal
from torch import nn

from unimoe_kernels import (
    MoE,
    RouterConfig,
    load_upcycled,
    stack_experts,
    unstack_experts,
    upcycle,
)
from unimoe_kernels.testing import relative_error

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def dense(kind="Llama", **options):
    return tiny_causal(kind, SIZES, **options)


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3", "Gemma"])
@pytest.mark.parametrize(
    "mode", ["topk_softmax", "softmax_topk_renorm", "sigmoid_renorm", "sparsemixer_renorm"]
)
def test_the_upcycled_model_answers_as_the_dense_one(kind, mode):
    model = dense(kind, head_dim=8)
    expected = logits_of(model)
    assert expected.std() > 0.1
    assert upcycle(model, num_experts=4, top_k=2, mode=mode) is model
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    assert len(moes) == 3
    assert all(not moe.training for moe in moes)
    assert relative_error(logits_of(model), expected) < 1e-5
    with torch.no_grad():
        moes[0].experts.down_proj.zero_()
    assert relative_error(logits_of(model), expected) > 1e-2


@pytest.mark.parametrize(
    ("layers", "expected"), [([0], [0]), ([-1, 0], [0, 2]), (range(3), [0, 1, 2]), ([1, 1], [1])]
)
def test_layers_choose_ffns(layers, expected):
    model = dense()
    before = logits_of(model)
    upcycle(model, num_experts=3, layers=layers)
    held = [isinstance(layer.mlp, MoE) for layer in model.model.layers]
    assert [i for i, is_moe in enumerate(held) if is_moe] == expected
    assert model.config.unimoe_upcycled["layers"] == expected
    assert relative_error(logits_of(model), before) < 1e-5


def test_the_router_learns():
    model = upcycle(dense(), num_experts=4, aux_loss="inject", load_balancing_coef=0.1).train()
    model(IDS, labels=IDS).loss.backward()
    moe = model.model.layers[1].mlp
    assert moe.router.weight.grad.abs().max() > 1e-6
    assert moe.experts.gate_up_proj.grad.abs().max() > 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tmp_path, tied):
    options = {"top_k": 2, "top_p": 0.6, "router_dtype": torch.float64, "layers": [1]}
    model = upcycle(dense(tie_word_embeddings=tied), num_experts=3, **options)
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight.normal_()
        model.model.layers[1].mlp.experts.down_proj.normal_()
    model.save_pretrained(tmp_path)
    (tmp_path / "._model.safetensors").write_bytes(b"attributes that macOS leaves")
    loaded = load_upcycled(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.model.layers[1].mlp.router.config.router_dtype == torch.float64
    generated = loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, IDS.shape[1] + 3)


def test_loading_keeps_what_from_pretrained_keeps(tmp_path):
    """Generation settings and dtype as saved, another dtype, and devices, as a dense model does."""
    model = upcycle(dense().bfloat16(), num_experts=2, mode="sigmoid_renorm", correction_bias=True)
    model.generation_config.update(eos_token_id=[2, 7], do_sample=True, temperature=0.3)
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        torch.nn.init.normal_(moe.router.correction_bias)
    model.save_pretrained(tmp_path)
    bias = next(b for name, b in model.named_buffers() if "correction_bias" in name)
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.float16}, {"device_map": "cpu"}):
        loaded = load_upcycled(tmp_path, **options)
        assert type(loaded) is type(model)
        assert loaded.generation_config.eos_token_id == [2, 7]
        assert loaded.generation_config.temperature == 0.3
        expected = options.get("dtype") if options.get("dtype") != "auto" else None
        assert loaded.dtype == (expected or torch.bfloat16)
        kept = next(b for name, b in loaded.named_buffers() if "correction_bias" in name)
        assert torch.equal(kept, bias)
        assert not loaded.training


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        load_upcycled(tmp_path)
    dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no upcycled model"):
        load_upcycled(tmp_path)
    model = upcycle(dense(), num_experts=2)
    state = model.state_dict()
    state["surplus"] = state.pop("model.layers.0.mlp.router.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match=r"missing \(.*router.weight'\]\) or left over"):
        load_upcycled(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, r"top_k \(3\) must be at most num_experts \(2\)"),
        ({"num_experts": 2, "mode": "sigmoid"}, r"mode \('sigmoid'\) must be one of"),
        ({"num_experts": 2, "scale": 2.0}, r"scale \(2.0\) must be 1.0"),
        ({"num_experts": 2, "num_null_experts": 1}, r"num_null_experts \(1\) would change"),
        ({"num_experts": 2, "num_shared_experts": 1}, r"num_shared_experts \(1\) would change"),
        ({"num_experts": 2, "capacity_factor": 1.0}, r"capacity_factor \(1.0\) would change"),
        ({"num_experts": 2, "router_config": RouterConfig()}, "router_config is not supported"),
        ({"num_experts": 2, "layers": [3]}, r"layers \(\[3\]\): 3 must be between -3 and 2"),
        ({"num_experts": 2, "layers": []}, r"layers \(\[\]\) must name"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    model = dense()
    with pytest.raises(ValueError, match=message):
        upcycle(model, **options)
    assert not any(isinstance(module, MoE) for module in model.modules())
    assert not hasattr(model.config, "unimoe_upcycled")


def test_models_that_it_does_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"model \(Linear\) has no FFN of gate_proj"):
        upcycle(nn.Linear(2, 2), num_experts=2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has the parameters .*bias"):
        upcycle(dense(mlp_bias=True), num_experts=2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.act_fn \(.*\) is none of"):
        upcycle(dense(hidden_act="mish"), num_experts=2)


def test_an_ffn_that_computes_something_else_is_refused():
    model = dense()
    ffn = model.model.layers[1].mlp

    class Scaled(type(ffn)):
        def forward(self, x):
            return 0.7 * super().forward(x)

    ffn.__class__ = Scaled
    message = r"layers\.1\.mlp \(Scaled\) must compute down_proj\(act_fn\(gate_proj\(x\)\)"
    with pytest.raises(ValueError, match=message):
        upcycle(model, num_experts=2)
    assert not any(isinstance(module, MoE) for module in model.modules())
    assert isinstance(upcycle(model, num_experts=2, layers=[0]).model.layers[0].mlp, MoE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stacking_and_unstacking_change_no_bit(dtype):
    keys = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    shapes = ((5, 3), (5, 3), (3, 5))
    ffns = [
        {key: torch.randn(shape).to(dtype) for key, shape in zip(keys, shapes, strict=True)}
        for _ in range(4)
    ]
    ffns[1][keys[0]][0, 0] = float("nan")
    gate_up_proj, down_proj = stack_experts(ffns)
    assert gate_up_proj.shape == (4, 10, 3)
    assert down_proj.shape == (4, 3, 5)
    again = unstack_experts(gate_up_proj, down_proj)
    for expected, got in zip(ffns, again, strict=True):
        assert list(got) == list(keys)
        for key in keys:
            assert torch.equal(got[key].nan_to_num(7), expected[key].nan_to_num(7))
    stacked = stack_experts(again)
    assert torch.equal(stacked[1], down_proj)
    assert torch.equal(stacked[0].nan_to_num(7), gate_up_proj.nan_to_num(7))
    assert gate_up_proj.data_ptr() != ffns[0][keys[0]].data_ptr()


def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ffns is empty"):
        stack_experts([])
    with pytest.raises(
        ValueError, match=r"gate_up_proj \(shape \(2, 3, 4\)\) must be \[E, 2F, D\]"
    ):
        unstack_experts(torch.zeros(2, 3, 4), torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match=r"down_proj \(shape \(2, 4, 1\)\) must be \(2, 4, 3\)"):
        unstack_experts(torch.zeros(2, 6, 4), torch.zeros(2, 4, 1))
