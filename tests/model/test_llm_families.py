"""Every LLM that a Uni-MoE is built on, beside the same LLM in transformers."""

import pytest
import torch
from llms import llm, llm_fields

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.llm_families import DENSE_FAMILIES, SPARSE_FAMILIES
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.assemble import (
    assemble_moe,
    ffn_state,
    merge_and_unload_lora,
)
from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.training.trained import select_trained

FAMILIES = (*DENSE_FAMILIES, *SPARSE_FAMILIES)


@pytest.fixture
def pair(tiny_config):
    """Makes an LLM of a family, and a Uni-MoE of its weights, both in float64."""

    def build(family):
        theirs = llm(family, tie_word_embeddings=False).double()
        config = tiny_config(
            text_config=theirs.config.to_dict(),
            num_experts=0,
            media_token_ids={"image": 290, "video": 291, "speech": 292, "audio": 293},
        )
        ours = UniMoEForConditionalGeneration(config).double().eval()
        ours.model.language_model.load_state_dict(theirs.model.state_dict())
        ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
        return theirs, ours

    return build


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def ids(rows=2, length=9):
    return torch.randint(1, 280, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_media_give_what_transformers_gives(pair, features, family):
    theirs, ours = pair(family)
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    expected = theirs(input_ids=text, attention_mask=mask).logits
    assert expected.std() > 0.1
    found = ours(input_ids=text, attention_mask=mask).logits
    assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-9

    text[:, 2:5] = 290
    images = features("image", 2).double()
    soft = ours.model.image_connector(images)
    embedded = theirs.get_input_embeddings()(text.masked_fill(text == 290, 0)).clone()
    embedded[:, 2:5] = soft
    expected = theirs(inputs_embeds=embedded).logits
    assert relative(ours(input_ids=text, image_features=images).logits, expected) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_continues_with_the_cache_of_the_family(pair, family):
    theirs, ours = pair(family)
    prompt = ids()
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    options["suppress_tokens"] = ours.generation_config.suppress_tokens
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_experts_that_are_copies_compute_what_the_dense_ffn_does(pair, family):
    _, dense = pair(family)
    sparse = assemble_moe(dense, {"a": ffn_state(dense), "b": ffn_state(dense)}, 2).eval()
    assert len(list(sparse.moe_layers())) == 2
    text = ids()
    outputs = {}
    for name, model in (("dense", dense), ("sparse", sparse)):
        logits = model(input_ids=text).logits
        logits.square().mean().backward()
        first = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
        outputs[name] = logits.detach(), first, model.get_input_embeddings().weight.grad
    for found, expected in zip(outputs["sparse"], outputs["dense"], strict=True):
        assert expected.norm() > 1e-3
        assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_as_its_family(pair, tmp_path, family):
    _, ours = pair(family)
    ours.float().save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.text_config.model_type == family
    text = ids()
    assert torch.equal(loaded(input_ids=text).logits, ours(input_ids=text).logits)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_experts_of_an_llm_run_on_our_kernels_and_take_lora(pair, family):
    theirs, ours = pair(family)
    assert ours.model.language_model.config._experts_implementation == "unimoe"
    parts = (TrainedPart("experts", rank=2, alpha=4.0), TrainedPart("router"))
    trained = select_trained(ours, parts)
    assert sum("lora_" in name for name in trained) == 2 * 4
    assert sum(name.endswith("mlp.gate.weight") for name in trained) == 2
    ours.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    text = ids()
    ours(input_ids=text).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.sub_(0.5 * parameter.grad / parameter.grad.norm().clamp(min=1e-12))
    for parameter in trained.values():  # now A has a gradient as well
        parameter.grad = None
    ours(input_ids=text).logits.square().mean().backward()
    assert all(parameter.grad.norm() > 0 for parameter in trained.values())
    adapted = ours(input_ids=text).logits
    merge_and_unload_lora(ours)
    assert not any("lora" in name for name in ours.state_dict())
    assert relative(ours(input_ids=text).logits, adapted) < 1e-9
    assert relative(adapted, theirs(input_ids=text).logits) > 1e-3


def test_activation_of_experts_is_that_of_the_llm(tiny_config):
    config = tiny_config(text_config=llm_fields("gemma"))
    model = UniMoEForConditionalGeneration(config)
    assert {moe.experts.activation for _, moe in model.moe_layers()} == {"gelu_tanh"}


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ({"model_type": "gpt2"}, {}, r"text_config.model_type \('gpt2'\) must be one of llama"),
        (llm_fields("qwen3_moe"), {"num_experts": 2}, r"num_experts \(2\) must be 0: .*qwen3_moe"),
        ({"mlp_bias": True}, {}, r"text_config.mlp_bias \(True\) must be False"),
        (
            llm_fields("gemma3_text", final_logit_softcapping=30.0),
            {},
            r"text_config.final_logit_softcapping \(30.0\) must be None",
        ),
        ({"hidden_act": "tanh"}, {"num_experts": 2}, r"text_config.hidden_act \('tanh'\) must be"),
    ],
)
def test_what_cannot_be_served_is_refused(text, fields, message):
    with pytest.raises(ValueError, match=message):
        UniMoEConfig(text_config=text, **({"num_experts": 0} | fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_of_a_packed_row_do_not_see_each_other(pair, family):
    _, ours = pair(family)
    one, other = ids(1, 5), ids(1, 9)[:, 4:]
    positions = torch.cat([torch.arange(5), torch.arange(5)]).unsqueeze(0)
    mask = torch.ones(1, 10, dtype=torch.bool)
    row = torch.cat([one, other], 1)
    # Eager attention of transformers takes its softmax in float32.
    for attention, limit in (("eager", 1e-6), ("sdpa", 1e-9)):
        ours.set_attn_implementation(attention)
        found = ours(input_ids=row, position_ids=positions, token_mask=mask, use_cache=False).logits
        expected = torch.cat([ours(input_ids=text).logits for text in (one, other)], 1)
        assert relative(found, expected) < limit
    assert relative(ours(input_ids=row, use_cache=False).logits, expected) > 1e-3
