import pytest
import torch
from torch.nn.functional import kl_div

from unimoe_kernels.testing import relative_error
from unimoe_model.modality import (
    MODALITIES,
    PADDING,
    ModalityGate,
    modality_expert_loss,
    modality_ids_of,
    modality_kl_loss,
)

KINDS = ("image", "video", "speech", "audio")
TEXT, IMAGE, VIDEO, SPEECH, AUDIO = range(5)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 7, 4, dtype=torch.float64, generator=generator).requires_grad_()


IDS = torch.tensor(
    [
        [TEXT, IMAGE, IMAGE, TEXT, AUDIO, TEXT, TEXT],
        [TEXT, VIDEO, TEXT, SPEECH, SPEECH, PADDING, PADDING],
    ]
)


def test_modality_of_every_position():
    tokens = dict(zip(KINDS, (50, 51, 52, 53), strict=True))
    ids = torch.tensor([[1, 50, 50, 7, 53, 9], [1, 51, 52, 52, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert modality_ids_of(ids, tokens, mask).tolist() == [
        [TEXT, IMAGE, IMAGE, TEXT, AUDIO, TEXT],
        [TEXT, VIDEO, SPEECH, SPEECH, PADDING, PADDING],
    ]
    assert ("text", *KINDS) == MODALITIES


def test_expert_loss_is_the_distance_of_media_tokens_from_their_experts(logits):
    experts = {"image": [0, 2], "speech": [3]}
    loss = modality_expert_loss(logits, IDS, experts)
    gates = logits.softmax(-1)
    image, speech = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 0, 1.0])
    expected = (gates[0, 1:3] - image).abs().mean(1).sum() / 7
    expected = expected + (gates[1, 3:5] - speech).abs().mean(1).sum() / 5
    assert relative_error(loss, expected) < 1e-12
    grad, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert relative_error(grad, wanted) < 1e-12
    assert not grad[0, [0, 3, 4, 5, 6]].any()


def test_kl_loss_compares_all_pairs_of_a_sample(logits):
    loss = modality_kl_loss(logits, IDS)
    gates = logits.softmax(-1)
    text, image, audio = gates[0, [0, 3, 5, 6]].mean(0), gates[0, 1:3].mean(0), gates[0, 4]

    def closeness(a, b):
        return 1 - kl_div(a.log(), b, reduction="sum")

    first = closeness(text, image) + closeness(text, audio) + closeness(image, audio)
    text, video, speech = gates[1, [0, 2]].mean(0), gates[1, 1], gates[1, 3:5].mean(0)
    second = closeness(text, video) + closeness(text, speech) + closeness(video, speech)
    expected = (first + second) / 3
    assert relative_error(loss, expected) < 1e-12
    grad, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert relative_error(grad, wanted) < 1e-12
    assert torch.isfinite(grad).all()
    assert not grad[1, 5:].any()
    assert modality_kl_loss(logits, torch.zeros_like(IDS)) == 0


def test_gate_maps_each_token_by_its_modality(logits):
    torch.manual_seed(0)
    gate = ModalityGate(4).double()
    mapped = gate(logits, IDS)
    for row in range(2):
        for position in range(7):
            name = MODALITIES[max(IDS[row, position], 0)]
            expected = gate.maps[name](logits[row, position])
            assert relative_error(mapped[row, position], expected) < 1e-12
    assert torch.equal(gate(logits, None), gate.maps["text"](logits))


def media_inputs(media_prompt, features):
    ids = media_prompt(*KINDS)
    inputs = {f"{kind}_features": features(kind) for kind in KINDS}
    labels = torch.where(ids < 20, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}, labels


@pytest.mark.parametrize(
    "options",
    [
        {"modality_expert_coef": 0.7, "modality_experts": {"image": [0, 2], "audio": [1]}},
        {"modality_kl_coef": 0.3},
    ],
)
def test_losses_reach_the_router_of_every_layer(tiny_model, media_prompt, features, options):
    inputs, labels = media_inputs(media_prompt, features)
    model, plain = tiny_model(**options).double(), tiny_model().double()
    logits = []
    for _, moe in plain.moe_layers():
        moe.router.register_forward_hook(
            lambda router, args, _: logits.append(args[0] @ router.weight.T)
        )
    out = model(**inputs, labels=labels)
    out.loss.backward()
    expected = plain(**inputs, labels=labels)
    # The loss that is reported is that of the text alone.
    assert relative_error(out.loss, expected.loss) < 1e-12
    ids = modality_ids_of(inputs["input_ids"], model.config.media_token_ids)
    total = expected.loss
    for layer in logits:
        if "modality_kl_coef" in options:
            total = total + 0.3 * modality_kl_loss(layer, ids)
        else:
            total = total + 0.7 * modality_expert_loss(layer, ids, options["modality_experts"])
    total.backward()
    before = tiny_model().double()
    before(**inputs, labels=labels).loss.backward()
    for (name, p), (_, q), (_, r) in zip(
        model.named_parameters(), plain.named_parameters(), before.named_parameters(), strict=True
    ):
        if q.grad is not None:
            assert relative_error(p.grad, q.grad) < 1e-10, name
        if "router" in name:
            assert relative_error(p.grad, r.grad) > 1e-6, name


def test_gate_before_the_router_changes_the_choice_alone(tiny_model, media_prompt, features):
    inputs, labels = media_inputs(media_prompt, features)
    model, plain = tiny_model(modality_gate=True), tiny_model()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for linear in layer.modality_gate.maps.values():
                linear.weight.copy_(torch.eye(32))
                linear.bias.zero_()
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert all("modality_gate" in key for key in left.missing_keys)
    same = model(**inputs).logits
    assert relative_error(same, plain(**inputs).logits) < 1e-5
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.modality_gate.maps["image"].weight.neg_()
    changed = model(**inputs, labels=labels)
    assert relative_error(changed.logits, same) > 1e-3
    changed.loss.backward()
    for layer in model.model.language_model.layers:
        assert layer.modality_gate.maps["image"].weight.grad.abs().sum() > 0


def test_options_of_the_layer_reach_it(tiny_model, media_prompt, features):
    inputs, _ = media_inputs(media_prompt, features)
    options = {
        "mode": "sparsemixer_renorm",
        "top_p": 0.7,
        "num_null_experts": 1,
        "num_shared_experts": 2,
        "shared_intermediate_size": 8,
        "shared_scores": "softmax",
    }
    model = tiny_model(moe_options=options, num_experts_per_tok=5)
    _, moe = next(model.moe_layers())
    assert moe.router.weight.shape[0] == 4 + 1 + 2
    assert torch.isfinite(model(**inputs).logits).all()
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
