"""Numbers of the published eight-expert code, at tiny sizes; see `test_golden.py`."""

import pytest
import torch
from published import (
    Case,
    encoded_media,
    expanded_rows,
    moe_layers_of,
    padded_batch,
    published_model,
)
from published_checks import (
    GRADIENT,
    LOGITS,
    OUTPUT,
    check_gradients,
    check_norms,
)
from published_eight import (
    NAMED,
    as_published_padding,
    eight_expert_names,
    gate_of_logits,
    gradients_with_lora,
    losses_of_layer,
    modality_ids_of_spans,
    published_experts,
    record_routers,
    scores_by_expert,
)

from unimoe_kernels import MoE, topk_router
from unimoe_kernels.testing import relative_error
from unimoe_model.modality import modality_expert_loss, modality_kl_loss
from unimoe_model.tokenization import (
    IGNORED,
)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("top2_nodrop", "nodrop"),
        ("top2_nodrop_small", "nodrop_small"),
        ("top2_drop_cf1", "drop_cf1"),
        ("top1_nodrop", None),
    ],
)
def test_gates_of_the_eight_expert_code(name, check):
    case = Case("gate_8e")
    io, facts = case.tensors(name), case.checks.get(check, {})
    logits = io["in.logits"]
    num_experts = case.config["num_experts"]
    top_k = 2 if name.startswith("top2") else 1
    x = logits.clone().requires_grad_()
    routed = gate_of_logits(num_experts, top_k, facts)(x)
    # Slots of an expert's buffer are theirs alone: they follow from who was dispatched.
    weights, slots = io["out.combine_weights"], io["out.dispatch_mask"].int().argmax(2)
    dense = scores_by_expert(routed, num_experts)
    assert relative_error(dense, weights.sum(2)) < OUTPUT
    assert torch.equal(dense > 0, io["out.dispatch_mask"].any(2))
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    assert x.grad is None
    assert torch.equal(x.detach(), logits)
    upstream = io["in.upstream_on_combine"].gather(2, slots.unsqueeze(2))[..., 0]
    (routed.load_balancing_loss + (upstream * dense).sum()).backward()
    assert relative_error(x.grad, io["grad.logits(l_aux + sum(R*combine))"]) < GRADIENT


def test_noise_for_the_second_choice_stays_in_the_published_logits():
    io = Case("gate_8e").tensors("top2_given_noise")
    logits, noise = io["in.logits"], io["in.gumbel_noise"]
    # The published gate adds it in place, so that the other losses see noisy logits.
    assert relative_error(io["out.logits_after_call"], logits + noise) < OUTPUT
    before = logits.clone()
    routed = topk_router(logits, 2, mode="softmax_topk_renorm", balance="first")
    assert torch.equal(logits, before)
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    first = io["out.dispatch_mask"].any(2).gather(1, routed.ids[:, :1].long())
    assert first.all()


def test_layer_of_the_eight_expert_code():
    case = Case("moe_layer_8e")
    sizes, io = case.config, case.tensors("io")
    moe = MoE(
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_experts"],
        sizes["k"],
        balance="first",
    )
    moe.experts.add_lora(
        sizes["lora_r"], sizes["lora_alpha"], freeze_base=False, split_gate_up=True
    )
    weights = case.tensors("weights")
    left = dict(weights)
    with torch.no_grad():
        for name, (parameter, index) in eight_expert_names(moe).items():
            parameter[index].copy_(left.pop(name))
    assert not left
    x = io["in.hidden_states"].requires_grad_()
    y, routed = moe(x, return_router=True)
    assert relative_error(y, io["out.hidden_states"]) < OUTPUT
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    assert torch.equal(routed.tokens_per_expert.long(), io["out.exp_counts"])
    logits = io["in.hidden_states"].flatten(0, 1) @ moe.router.weight.T
    assert relative_error(logits, io["out.router_logits"]) < OUTPUT
    ((y * io["in.grad_output"]).sum() + 0.5 * routed.load_balancing_loss).backward()
    found = {name: p.grad[index] for name, (p, index) in eight_expert_names(moe).items()}
    check_norms(found, case.checks["grad_norms"])
    stored = case.below("io", "grad.")
    assert relative_error(x.grad, stored.pop("in.hidden_states")) < GRADIENT
    assert stored
    check_gradients(found, stored)


def test_losses_of_the_eight_expert_code():
    case = Case("aux_losses_8e")
    sizes, io = case.config, case.tensors("io")
    batch, tokens = sizes["batch"], sizes["tokens"]
    logits = io["in.hidden_states"] @ io["in.lm_head.weight"].T
    labels = io["in.labels"][:, 1:].flatten()
    ce = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED
    )
    assert relative_error(ce, io["out.ce"]) < OUTPUT
    ids = modality_ids_of_spans(sizes["spans"], (batch, tokens), NAMED)
    layers = [
        io[f"in.gate_logits.layer{n}"].view(batch, tokens, -1).requires_grad_()
        for n in range(sizes["layers"])
    ]
    balance = io["in.l_aux_per_layer"].sum()
    losses = {
        "aux_balance_loss": balance,
        "aux_multimodal_loss": sum(
            modality_expert_loss(layer, ids, published_experts(sizes)) for layer in layers
        ),
        "aux_kl_loss": sum(modality_kl_loss(layer, ids, as_released=True) for layer in layers),
    }
    for name, loss in losses.items():
        # Stored terms are differences of totals.
        assert abs(loss - io[f"out.{name}"]) < 2e-6, name
        total = ce + sizes["coef"] * loss
        assert relative_error(total, io[f"out.total_with_{name}"]) < OUTPUT, name
        if name != "aux_balance_loss":
            gradients = torch.autograd.grad(loss, layers)
            for number, gradient in enumerate(gradients):
                expected = io[f"grad.{name}.gate_logits.layer{number}"].view_as(gradient)
                assert relative_error(gradient, expected) < GRADIENT, name
    total = ce + sizes["coef"] * sum(losses.values())
    assert relative_error(total, io["out.total_all"]) < OUTPUT
    # Ours has one softmax, the whole divergence, and the pair of image and video.
    own = sum(modality_kl_loss(layer, ids) for layer in layers)
    assert relative_error(own, losses["aux_kl_loss"]) > 1e-3


def test_model_of_the_eight_expert_code():
    case = Case("llama_moe_8e")
    fields, weights = case.config, case.tensors("weights")
    model = published_model(
        case, "speech", moe_layers=moe_layers_of(weights), moe_options={"balance": "first"}
    )
    io = case.tensors("io")
    rows = expanded_rows(io, model.config, "speech")
    batch = padded_batch(rows, io["out.logits"].shape[1])
    mask = batch["attention_mask"].bool()
    features = encoded_media(io, weights, "speech")
    seen = record_routers(model)
    embeddings = as_published_padding(model, io, batch, features)
    out = model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert relative_error(out.logits[mask], io["out.logits"][mask]) < LOGITS
    assert relative_error(out.loss, io["out.loss_ce"]) < OUTPUT

    # Published losses count padding as text.
    spans = {kind: case.checks["spans"][kind] for kind in NAMED}
    ids = modality_ids_of_spans(spans, mask.shape, NAMED)
    total = balance_only = out.loss
    for number, (logits, _) in enumerate(seen):
        gates = io[f"out.gate_logits.layer{number}"].view_as(logits)
        assert relative_error(logits[mask], gates[mask]) < LOGITS
        losses = losses_of_layer(logits, ids, fields)
        assert relative_error(losses["aux_balance_loss"], io[f"out.l_aux.layer{number}"]) < OUTPUT
        weighted = {name: fields[f"{name}_coef"] * loss for name, loss in losses.items()}
        balance_only = balance_only + weighted["aux_balance_loss"]
        total = total + sum(weighted.values())
    assert relative_error(balance_only, io["out.loss_balance_only"]) < OUTPUT
    assert relative_error(total, io["out.loss_all_aux"]) < OUTPUT
    total.backward()
    scale = fields["lora_alpha"] / fields["lora_r"]
    found = gradients_with_lora(model, weights, scale)
    assert case.checks["grad_norms"].keys() <= found.keys() | set(weights)
    assert len(case.checks["grad_norms"].keys() & found.keys()) > 100
    norms = case.checks["grad_norms"].items()
    check_norms(found, {name: norm for name, norm in norms if name in found and norm > 1e-6})

    # Ours leave it out: a wider batch changes none of them.
    seen.clear()
    wider = padded_batch(rows, mask.shape[1] + 5)
    model(**batch, **features)
    model(**wider, **features)
    half = len(seen) // 2
    for (_, narrow), (_, wide) in zip(seen[:half], seen[half:], strict=True):
        assert relative_error(wide.load_balancing_loss, narrow.load_balancing_loss) < OUTPUT
