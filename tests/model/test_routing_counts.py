"""Which experts the tokens of each modality go to, counted batch by batch."""

import pytest
import torch

from unimoe_model.evaluation.routing import RoutingCounts, recorded_routing
from unimoe_model.processing import UniMoEProcessor


@pytest.fixture
def batches(tiny_config, tokenizer, encoders):
    """Two batches of prompts with and without media, padded on the right."""
    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer)
    pictures = [torch.full((3, 3, 3), 40 * number, dtype=torch.uint8) for number in range(3)]
    clip = torch.linspace(-1, 1, 50).numpy()
    right = {"padding_side": "right"}
    return [
        processor(
            ["USER: <image>what shape is it? ASSISTANT: circle", "USER: yes? ASSISTANT: no"],
            images=pictures[:1],
            **right,
        ),
        processor(
            ["USER: <image><speech> ASSISTANT:", "USER: <image>what? ASSISTANT: red"],
            images=pictures[1:],
            speech=[clip],
            **right,
        ),
    ]


def test_shares_are_of_the_tokens_of_a_modality_in_all_batches(batches, tiny_model):
    model = tiny_model()
    counts = RoutingCounts(model)
    for batch in batches:
        counts.add(batch)
    shares = counts.shares()
    assert set(shares) == {"text", "image", "speech"}
    for share in shares.values():
        assert share.shape == (2, 4)
        assert share.dtype == torch.float64
        assert torch.allclose(share.sum(1), torch.ones(2).double())
    taken = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        with recorded_routing(model) as chosen, torch.no_grad():
            model.hidden_states(**batch)
        is_image = (batch["input_ids"] == model.config.media_token_ids["image"]).flatten()
        taken += torch.bincount(chosen[1][0][is_image].flatten().long(), minlength=4)
    assert torch.allclose(shares["image"][1], taken / taken.sum())
    assert counts.tokens["image"] == 3 * 3
    assert counts.tokens["speech"] == 4
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert sum(counts.tokens.values()) == real


def test_hooks_are_gone_after_recording(tiny_model):
    model = tiny_model(moe_layers="even")
    with recorded_routing(model) as chosen:
        model.hidden_states(input_ids=torch.tensor([[20, 30]]))
    assert {layer: len(ids) for layer, ids in chosen.items()} == {0: 1}
    model.hidden_states(input_ids=torch.tensor([[20, 30]]))
    assert len(chosen[0]) == 1


def test_choices_that_no_expert_answers_are_left_out(tiny_model, media_prompt, features):
    """Ids past the experts stand for null experts and choices given up."""
    model = tiny_model()
    ids = media_prompt("image")
    _, moe = next(model.moe_layers())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["image_features"] = features("image")

    def give_up_second_choices(module, arguments, routed):
        return routed._replace(ids=torch.cat([routed.ids[:, :1], 4 + 0 * routed.ids[:, 1:]], 1))

    hook = moe.router.register_forward_hook(give_up_second_choices)
    counts = RoutingCounts(model)
    counts.add(inputs)
    hook.remove()
    with recorded_routing(model) as chosen, torch.no_grad():
        model.hidden_states(**inputs)
    is_image = ids[0] == model.config.media_token_ids["image"]
    first = torch.bincount(chosen[0][0][is_image][:, 0], minlength=4).double()
    assert torch.equal(counts.shares()["image"][0], first / 3)
    assert counts.tokens["image"] == 3


def test_a_dense_model_routes_nothing(tiny_model):
    with pytest.raises(ValueError, match="model must have MoE layers"):
        RoutingCounts(tiny_model(num_experts=0))
