import pytest
import torch

from unimoe_kernels import MoE
from unimoe_kernels.testing import relative_error

KINDS = ("image", "video", "speech", "audio")


class IgnoresMask(torch.nn.Module):
    """Puts a `LoopedMoE`, which knows no mask, where the model calls an `MoE`."""

    def __init__(self, looped):
        super().__init__()
        self.looped = looped

    def forward(self, x, token_mask=None):
        return self.looped(x)


def with_looped_layers(model):
    for index, moe in list(model.moe_layers()):
        looped = IgnoresMask(moe.to_looped())
        model.model.language_model.layers[index].mlp = looped
    return model


def row_of_each_kind(media_prompt, features):
    ids = media_prompt(*KINDS)
    return {"input_ids": ids, **{f"{kind}_features": features(kind) for kind in KINDS}}


def test_soft_tokens_land_exactly_at_their_placeholders(tiny_model, media_prompt):
    model = tiny_model()
    rows = [media_prompt("image", "speech"), media_prompt("speech", "image")]
    ids = torch.cat(rows)
    soft = {"image": torch.randn(2, 3, 32), "speech": torch.randn(2, 4, 32)}
    spliced = model.model.splice(ids, soft)
    text = model.get_input_embeddings()(ids)
    is_media = torch.zeros_like(ids, dtype=torch.bool)
    for kind, tokens in soft.items():
        at = ids == model.config.media_token_ids[kind]
        is_media |= at
        for row in range(2):
            assert torch.equal(spliced[row][at[row]], tokens[row])
    assert torch.equal(spliced[~is_media], text[~is_media])


def test_several_items_of_a_kind_fill_rows_in_order(tiny_model, media_prompt):
    model = tiny_model()
    two, one = media_prompt("image", "image"), media_prompt("image", question="what shape is it it")
    width = max(two.shape[1], one.shape[1])
    pad = model.config.text_config.pad_token_id
    ids = torch.cat(
        [torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in (two, one)]
    )
    images = torch.randn(3, 3, 32)
    spliced = model.model.splice(ids, {"image": images})
    at = ids == model.config.media_token_ids["image"]
    assert torch.equal(spliced[0][at[0]], images[:2].flatten(0, 1))
    assert torch.equal(spliced[1][at[1]], images[2])


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_and_items_must_match(tiny_model, media_prompt, features, kind):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"<{kind}> placeholder tokens, but 0 soft"):
        model(input_ids=media_prompt(kind))
    message = f"hold 0 <{kind}> placeholder tokens, but {model.config.num_soft_tokens(kind)} soft"
    with pytest.raises(ValueError, match=message):
        model(input_ids=media_prompt(), **{f"{kind}_features": features(kind)})


def test_an_item_cannot_be_split_between_rows(tiny_model, tokenizer, features):
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[1, image, image, 20], [1, image, 20, 20]])
    with pytest.raises(ValueError, match=r"rows of input_ids hold \[2, 1\] <image>.*multiple of 3"):
        tiny_model()(input_ids=ids, image_features=features("image"))


def test_media_and_embeddings_exclude_each_other(tiny_model, features):
    with pytest.raises(ValueError, match="media requires input_ids"):
        tiny_model()(inputs_embeds=torch.randn(1, 4, 32), image_features=features("image"))


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("image", (1, 4, 12), r"\[\*, 3, 12\]"),
        ("image", (1, 3, 11), r"\[\*, 3, 12\]"),
        ("video", (1, 3, 12), r"\[\*, 2, 3, 12\]"),
        ("video", (1, 8, 3, 12), r"\[\*, 2, 3, 12\]"),
        ("speech", (1, 6, 15), r"\[\*, \*, 16\]"),
        ("audio", (6, 10), r"\[\*, \*, 10\]"),
    ],
)
def test_features_of_a_wrong_shape_are_refused(tiny_model, media_prompt, kind, shape, expected):
    with pytest.raises(ValueError, match=f"{kind}_features .* must have shape {expected}"):
        tiny_model()(input_ids=media_prompt(kind), **{f"{kind}_features": torch.randn(shape)})


@pytest.mark.parametrize("kind", ["speech", "audio"])
def test_query_states_give_what_features_give(tiny_model, media_prompt, features, kind):
    model = tiny_model()
    ids, given = media_prompt(kind), features(kind)
    states = model.model.connector(kind).hidden_states(given)
    by_features = model(input_ids=ids, **{f"{kind}_features": given}).logits
    by_states = model(input_ids=ids, **{f"{kind}_query_states": states}).logits
    assert torch.equal(by_features, by_states)
    with pytest.raises(ValueError, match=f"{kind}_features or {kind}_query_states, not both"):
        model(input_ids=ids, **{f"{kind}_features": given, f"{kind}_query_states": states})
    with pytest.raises(ValueError, match=rf"{kind}_query_states .* must have shape \[\*, "):
        model(input_ids=ids, **{f"{kind}_query_states": states[..., :-1]})


def test_images_and_videos_share_a_connector(tiny_model):
    model = tiny_model().model
    assert model.connector("image") is model.connector("video")


def test_looped_layers_give_the_same_logits(tiny_model, media_prompt, features):
    model = tiny_model()
    inputs = row_of_each_kind(media_prompt, features)
    with torch.no_grad():
        logits = model(**inputs).logits
        looped = with_looped_layers(model)(**inputs).logits
    assert 0.1 < logits.std() < 10
    assert relative_error(logits, looped) < 1e-5


def test_attention_of_matmuls_gives_the_same_logits(tiny_model, media_prompt, features):
    model = tiny_model()
    inputs = row_of_each_kind(media_prompt, features)
    with torch.no_grad():
        fused = model(**inputs).logits
        model.set_attn_implementation("eager")
        logits = model(**inputs).logits
    assert model.model.speech_connector.decoder.config._attn_implementation == "eager"
    assert relative_error(logits, fused) < 1e-5


def test_experts_and_router_start_like_the_rest_of_the_model(tiny_model):
    for std in (0.2, 0.05):
        model = tiny_model(text_config={"initializer_range": std})
        for _, moe in model.moe_layers():
            for name, weight in moe.named_parameters():
                assert weight.std().item() == pytest.approx(std, rel=0.25), name


def test_experts_sit_in_every_nth_layer(tiny_model):
    model = tiny_model(moe_layers="even")
    assert [index for index, _ in model.moe_layers()] == [0]
    assert not isinstance(model.model.language_model.layers[1].mlp, MoE)
    assert not list(tiny_model(num_experts=0).moe_layers())
    assert len(list(tiny_model().moe_layers())) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_of_a_real_token(tiny_model, media_prompt, features, side):
    model = tiny_model()
    inputs = row_of_each_kind(media_prompt, features)
    ids = inputs.pop("input_ids")
    padding = (5, 0) if side == "left" else (0, 5)
    padded = torch.nn.functional.pad(ids, padding, value=model.config.text_config.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
    with torch.no_grad():
        alone = model(input_ids=ids, **inputs).logits
        logits = model(input_ids=padded, attention_mask=mask, **inputs).logits
    assert relative_error(logits[mask.bool()], alone[0]) < 1e-5


def test_loss_is_the_mean_over_labelled_tokens(tiny_model, media_prompt):
    model = tiny_model()
    ids = media_prompt(question="a red circle").repeat(2, 1)
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    labels[1, -1] = 3
    output = model(input_ids=ids, labels=labels)
    logp = output.logits.double().log_softmax(-1)
    picked = [logp[0, -3, ids[0, -2]], logp[0, -2, ids[0, -1]], logp[1, -2, 3]]
    assert relative_error(output.loss, -torch.stack(picked).mean()) < 1e-6


def test_last_logits_only(tiny_model, media_prompt):
    model = tiny_model()
    ids = media_prompt()
    full, last = model(input_ids=ids).logits, model(input_ids=ids, logits_to_keep=2).logits
    assert last.shape[1] == 2
    assert relative_error(last, full[:, -2:]) < 1e-6


def router_gradients(model, ids, mask):
    """Gradients that reach the routers when the model's own output is given none."""
    model.zero_grad()
    hidden = model.hidden_states(input_ids=ids, attention_mask=mask)
    (0.0 * hidden).sum().backward()
    return [moe.router.weight.grad for _, moe in model.moe_layers()]


def test_injected_loss_trains_the_router_on_real_tokens_only(tiny_model, media_prompt):
    model = tiny_model(load_balancing_coef=1.0, router_z_coef=0.1)
    ids = media_prompt()
    pad = model.config.text_config.pad_token_id
    padded = torch.nn.functional.pad(ids, (0, 9), value=pad)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 9))
    alone = router_gradients(model, ids, torch.ones_like(ids))
    masked = router_gradients(model, padded, mask)
    unmasked = router_gradients(model, padded, torch.ones_like(padded))
    for a, m, u in zip(alone, masked, unmasked, strict=True):
        assert a.norm() > 0
        assert relative_error(m, a) < 1e-4
        assert relative_error(u, a) > 1e-2
    none = router_gradients(model, padded, torch.zeros_like(padded))
    assert all(g.norm() == 0 for g in none)


def test_without_coefficients_no_loss_is_injected(tiny_model, media_prompt):
    ids = media_prompt()
    gradients = router_gradients(tiny_model(), ids, torch.ones_like(ids))
    assert all(gradient.norm() == 0 for gradient in gradients)


def test_every_trainable_part_gets_a_gradient(tiny_model, media_prompt, features):
    model = tiny_model()
    inputs = row_of_each_kind(media_prompt, features)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = {
        name
        for name, p in model.named_parameters()
        if p.grad is None and "decoder.embed_tokens" not in name
    }
    assert without == set()


def test_activation_checkpointing_changes_no_gradient(tiny_model, media_prompt):
    ids = media_prompt()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(load_balancing_coef=1.0).train()
        if checkpointing:
            # transformers renames it; both names must do.
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([moe.router.weight.grad for _, moe in model.moe_layers()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert relative_error(recomputed, plain) < 1e-5
