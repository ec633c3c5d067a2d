import warnings

import pytest
import torch

from unimoe_kernels.testing import relative_error
from unimoe_model.checkpoints.assemble import assemble
from unimoe_model.cli import main
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.assemble import assemble_moe, ffn_state, merge_and_unload_lora
from unimoe_model.training.check import stage_config
from unimoe_model.training.loss import answer_loss
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe import START, Stage
from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.training.trained import select_trained
from unimoe_model.training.widening import widen_ffns


@pytest.fixture
def dense(tiny_model):
    return tiny_model(num_experts=0)


@pytest.fixture
def inputs(media_prompt, features):
    ids = media_prompt("image", "speech")
    return {
        "input_ids": ids,
        "image_features": features("image"),
        "speech_features": features("speech"),
    }


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def changed(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}


@pytest.mark.parametrize(("moe_layers", "number"), [("all", 2), ("even", 1), ([1], 1)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_equal_to_the_dense_ffn_give_its_logits(dense, inputs, top_k, moe_layers, number):
    state = ffn_state(dense)
    experts = dict.fromkeys(("image", "speech", "audio"), state)
    moe = assemble_moe(dense, experts, top_k, moe_layers=moe_layers)
    assert len(list(moe.moe_layers())) == number
    assert moe.config.num_experts == 3
    assert moe.config.expert_origins == ["image", "speech", "audio"]
    assert relative_error(logits_of(moe, inputs), logits_of(dense, inputs)) < 1e-5


def test_shared_experts_start_as_the_dense_ffn(dense, inputs):
    """Weights of routed and shared experts add up to one, so that equal FFNs give its outputs."""
    options = {"mode": "softmax_topk_renorm", "top_p": 0.7, "num_shared_experts": 2}
    options |= {"shared_scores": "softmax"}
    experts = dict.fromkeys(("image", "speech", "audio"), ffn_state(dense))
    moe = assemble_moe(dense, experts, 3, moe_options=options)
    assert relative_error(logits_of(moe, inputs), logits_of(dense, inputs)) < 1e-5
    narrow = options | {"shared_intermediate_size": 8}
    with pytest.raises(ValueError, match=r"shared_intermediate_size \(8\) must be the width"):
        assemble_moe(dense, experts, 3, moe_options=narrow)


def test_every_expert_lands_in_its_slot(dense, inputs):
    state = ffn_state(dense)
    experts = {name: changed(state, i) for i, name in enumerate("abc")}
    moe = assemble_moe(dense, experts, 1)
    for layer, mlp in moe.moe_layers():
        for slot, expert in enumerate(experts.values()):
            gate, up = mlp.experts.gate_up_proj[slot].chunk(2)
            assert torch.equal(gate, expert[f"{layer}.gate_proj.weight"])
            assert torch.equal(up, expert[f"{layer}.up_proj.weight"])
            assert torch.equal(mlp.experts.down_proj[slot], expert[f"{layer}.down_proj.weight"])


def test_a_router_that_takes_one_expert_gives_the_model_of_that_expert(dense, inputs):
    state = ffn_state(dense)
    experts = {name: changed(state, i) for i, name in enumerate("abc")}
    moe = assemble_moe(dense, experts, 1)
    with torch.no_grad():
        for layer, mlp in moe.moe_layers():
            mlp.router.forward = lambda x, mask=None, router=mlp.router: (
                type(router)
                .forward(router, x, mask)
                ._replace(ids=torch.full((x.reshape(-1, x.shape[-1]).shape[0], 1), 1).int())
            )
            for name in ("gate_proj", "up_proj", "down_proj"):
                ffn = getattr(dense.model.language_model.layers[layer].mlp, name)
                ffn.weight.copy_(experts["b"][f"{layer}.{name}.weight"])
    assert relative_error(logits_of(moe, inputs), logits_of(dense, inputs)) < 1e-5


def test_assembling_leaves_the_dense_model_alone(dense):
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    moe = assemble_moe(dense, {"a": ffn_state(dense)}, 1, load_balancing_coef=0.5)
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    assert all(mlp.load_balancing_coef == 0.5 for _, mlp in moe.moe_layers())
    assert moe.model.language_model.layers[0].mlp.router.weight.std() > 0.1
    kept = [k for k in before if ".mlp." not in k]
    state = moe.state_dict()
    assert all(torch.equal(before[k], state[k]) for k in kept)


def test_ffn_state_is_a_copy(dense):
    state = ffn_state(dense)
    assert len(state) == 6
    before = {k: v.clone() for k, v in state.items()}
    with torch.no_grad():
        dense.model.language_model.layers[0].mlp.gate_proj.weight.zero_()
    assert all(torch.equal(before[k], state[k]) for k in state)


def test_what_cannot_be_assembled_is_refused(dense, tiny_model):
    with pytest.raises(ValueError, match="at least one FFN"):
        assemble_moe(dense, {}, 1)
    with pytest.raises(ValueError, match=r"dense has num_experts \(4\), expected 0"):
        assemble_moe(tiny_model(), {"a": ffn_state(dense)}, 1)
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(2\)"):
        assemble_moe(dense, {"a": ffn_state(dense)}, 2)


def add_lora(model, *parts):
    """Puts LoRA of rank 3 and alpha 6 on parts of a model."""
    return select_trained(model, [TrainedPart(part, 3, 6) for part in parts])


def fill(parameters):
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.1)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["attention", "experts"]),
        ({"num_experts": 0}, ["ffn"]),
        ({"moe_layers": "even"}, ["attention", "ffn", "experts"]),
    ],
)
def test_lora_starts_as_nothing_and_merges_to_what_it_was(
    tiny_model, inputs, tmp_path, fields, parts
):
    model = tiny_model(**fields)
    plain, keys = logits_of(model, inputs), model.state_dict().keys()
    added = add_lora(model, *parts)
    assert relative_error(logits_of(model, inputs), plain) < 1e-6
    fill(added)
    tuned = logits_of(model, inputs)
    assert relative_error(tuned, plain) > 1e-2
    merge_and_unload_lora(model)
    assert relative_error(logits_of(model, inputs), tuned) < 1e-5
    assert model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert relative_error(logits_of(loaded, inputs), tuned) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, *parts)


def test_lora_covers_the_named_parts_of_every_layer(tiny_model):
    names = set(add_lora(tiny_model(moe_layers="even"), "attention", "ffn", "experts"))
    layers = "model.language_model.layers"
    expected = {
        f"{layers}.{layer}.self_attn.{projection}_proj.lora_{half}.attention.weight"
        for layer in (0, 1)
        for projection in "qkvo"
        for half in "AB"
    }
    expected |= {
        f"{layers}.1.mlp.{projection}_proj.lora_{half}.ffn.weight"
        for projection in ("gate", "up", "down")
        for half in "AB"
    }
    expected |= {
        f"{layers}.0.mlp.experts.expert_lora.{projection}.lora_{half}"
        for projection in ("gate_up_proj", "down_proj")
        for half in "AB"
    }
    assert names == expected


def test_lora_of_some_layers_leaves_the_others_alone(tiny_model, inputs):
    model = tiny_model(num_experts=0)
    plain = logits_of(model, inputs)
    parts = [TrainedPart(part, 3, 6, layers=(1,)) for part in ("attention", "ffn")]
    added = select_trained(model, parts)
    linears = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert {name.split(".lora_")[0].split("layers.")[1] for name in added} >= {
        f"1.{linear}" for linear in linears
    }
    assert all(".layers.1." in name for name in added)
    fill(added)
    tuned = logits_of(model, inputs)
    assert relative_error(tuned, plain) > 1e-2
    merge_and_unload_lora(model)
    assert relative_error(logits_of(model, inputs), tuned) < 1e-5


def test_only_what_is_trained_gets_gradients(tiny_model, inputs):
    model = tiny_model()
    lora = TrainedPart("experts", 3, 6)
    trained = select_trained(model, [lora, TrainedPart("router"), TrainedPart("projectors.image")])
    fill({name: parameter for name, parameter in trained.items() if "lora_" in name})
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    answer_loss(model, inputs | {"labels": inputs["input_ids"]}).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert name not in trained or parameter.grad.norm() > 0, name


@pytest.mark.parametrize(
    ("times", "width"), [(1, 48), (2, 96), (3, 144), (1.3333, 64), (1.01, 48), (2.5, 120)]
)
def test_wider_ffns_give_the_same_logits(dense, inputs, times, width):
    expected = logits_of(dense, inputs)
    wide = widen_ffns(dense, times)
    assert wide.config.text_config.intermediate_size == width
    last = wide.model.language_model.layers[1].mlp.down_proj
    assert last.weight.shape[1] == last.in_features == width
    assert relative_error(logits_of(wide, inputs), expected) < 1e-5
    with torch.no_grad():
        last.weight[:, width - 1] = 0
    assert relative_error(logits_of(wide, inputs), expected) > 1e-4
    assert dense.config.text_config.intermediate_size == 48
    settings = Optimization(steps=1, batch_size=1, learning_rate=1e-3)
    stage = Stage("s", START, (TrainedPart("ffn"),), ({"own": 1.0},), settings, widen=times)
    assert stage_config(stage, {START: dense.config}).to_dict() == wide.config.to_dict()


def test_widening_is_refused_where_it_has_no_meaning(dense, tiny_model):
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        widen_ffns(dense, 0)
    with pytest.raises(ValueError, match=r"model has num_experts \(4\), expected 0"):
        widen_ffns(tiny_model(), 2)


@pytest.fixture
def dense_folders(tiny_model, tokenizer, tmp_path):
    """Folders of a base and of two dense models with other FFNs."""
    folders = {}
    for number, name in enumerate(("base", "vision", "hearing")):
        model = tiny_model(num_experts=0)
        state = changed(ffn_state(model), number) if number else ffn_state(model)
        for key, value in state.items():
            layer, _, rest = key.partition(".")
            mlp = model.model.language_model.layers[int(layer)].mlp
            mlp.get_parameter(rest).data.copy_(value)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("moe_layers", ["all", "second_half"])
def test_folders_are_assembled_as_models_are(dense_folders, tmp_path, inputs, moe_layers):
    load = UniMoEForConditionalGeneration.from_pretrained
    # They describe the dense model that the base was converted from.
    for name in ("conversion.json", "published_aside.safetensors"):
        (dense_folders["base"] / name).touch()
    config = assemble(
        dense_folders["base"], dense_folders, tmp_path / "moe", 2, moe_layers, shard_bytes=9000
    )
    assert config.expert_origins == ["base", "vision", "hearing"]
    found = load(tmp_path / "moe")
    assert found.config.expert_origins == config.expert_origins
    models = {name: load(folder) for name, folder in dense_folders.items()}
    expected = assemble_moe(
        models["base"], {n: ffn_state(m) for n, m in models.items()}, 2, moe_layers=moe_layers
    )
    expected.load_state_dict(
        {k: v for k, v in found.state_dict().items() if "router" in k}, strict=False
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    routers = [moe.router.weight for _, moe in found.moe_layers()]
    assert all(0.1 < router.std() < 0.3 for router in routers)
    assert UniMoEProcessor.from_pretrained(tmp_path / "moe").num_soft_tokens["speech"] == 4
    assert not [*(tmp_path / "moe").glob("conversion*"), *(tmp_path / "moe").glob("*aside*")]


def test_folders_that_cannot_be_assembled(dense_folders, tmp_path, tiny_model):
    base, target = dense_folders["base"], tmp_path / "moe"
    with pytest.raises(ValueError, match="already exists"):
        assemble(base, dense_folders, base)
    tiny_model().save_pretrained(tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"sparse\) must hold a dense unimoe model"):
        assemble(base, dense_folders | {"sparse": tmp_path / "sparse"}, target)
    text = {"intermediate_size": 40}
    tiny_model(num_experts=0, text_config=text).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"shape \[40, 32\]"):
        assemble(base, dense_folders | {"narrow": tmp_path / "narrow"}, target)
    for top_k in (0, 4):
        message = rf"top_k \({top_k}\) must be at least 1 and at most the number of experts \(3\)"
        with pytest.raises(ValueError, match=message):
            assemble(base, dense_folders, target, top_k=top_k)
    assert not target.exists()


def test_assemble_command(dense_folders, tmp_path, capsys):
    experts = [f"--expert={name}={folder}" for name, folder in dense_folders.items()]
    command = ["assemble", "--base", str(dense_folders["base"]), *experts]
    command += ["--to", str(tmp_path / "moe"), "--moe-layers", "[1]"]
    assert main(command) == 0
    assert "3 experts: base, vision, hearing" in capsys.readouterr().out
    assert UniMoEConfig.from_pretrained(tmp_path / "moe").moe_layers == [1]
    assert main([*command, "--expert", "base"]) == 1
    assert "expert (base) must be NAME=VALUE" in capsys.readouterr().err
    command[-1] = "3"
    assert main([*command[:-3], str(tmp_path / "other"), *command[-2:]]) == 1
    assert "moe_layers (3) must be one of" in capsys.readouterr().err


def test_tied_embeddings_are_written_once(tiny_model, tmp_path):
    model = tiny_model(num_experts=0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    experts = {"a": tmp_path / "dense", "b": tmp_path / "dense"}
    assemble(tmp_path / "dense", experts, tmp_path / "moe")
    found = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "moe")
    assert found.lm_head.weight is found.get_input_embeddings().weight
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
