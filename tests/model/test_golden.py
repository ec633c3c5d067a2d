"""Numbers of the published code at tiny sizes, from `UNIMOE_GOLDEN` or tests/golden.

Each case is a folder with a `case.json`, which has all sizes, names and numbers, so that another
set of the same form needs no change here.
"""

import pytest
import torch
from in_memory import from_published, to_published
from published import (
    Case,
    language_model_config,
    moe_layers_of,
    published_model,
)
from published_checks import (
    GRADIENT,
    LOGITS,
    OUTPUT,
    check_forward,
    check_gradients,
    check_norms,
    generate_row,
    gradients_of,
    spliced,
)

from unimoe_kernels import LoopedMoE, MoE, unstack_experts
from unimoe_kernels.testing import relative_error
from unimoe_model.modeling import UniMoEForConditionalGeneration


def test_moe_layer():
    case = Case("moe_layer")
    sizes = case.config["hidden_size"], case.config["intermediate_size"]
    for name, facts in case.checks.items():
        looped = LoopedMoE(*sizes, facts["num_experts"], facts["top_k"])
        looped.load_state_dict(case.below(name, "state."))
        io, grads = case.tensors(name), case.below(name, "grad.state.")
        moe = MoE.from_looped(looped)
        for layer in (looped, moe):
            x = io["in.hidden_states"].requires_grad_()
            x.grad = None
            y = layer(x)
            y.backward(io["in.grad_output"])
            assert relative_error(y, io["out.hidden_states"]) < OUTPUT, name
            assert relative_error(x.grad, io["grad.in.hidden_states"]) < GRADIENT, name
        routed = moe.router(io["in.hidden_states"])
        assert torch.equal(routed.ids.long(), io["out.selected_experts"]), name
        assert relative_error(routed.scores, io["out.routing_weights"]) < OUTPUT, name
        assert routed.tokens_per_expert.tolist() == facts["tokens_per_expert"]
        gradients = [moe.experts.gate_up_proj.grad, moe.experts.down_proj.grad]
        found = {"gate.weight": moe.router.weight.grad}
        for expert, state in enumerate(unstack_experts(*gradients)):
            found |= {f"experts.{expert}.{key}": value for key, value in state.items()}
        own = {key: p.grad for key, p in looped.named_parameters()}
        assert found.keys() == own.keys() == grads.keys()
        check_gradients(found, grads)
        check_gradients(own, grads)


@pytest.mark.parametrize("name", ["llama_moe_all", "llama_moe_interval"])
def test_language_model(name):
    case = Case(name)
    fields = dict(case.config)
    moe_layers = case.checks.get("moe_layers", list(range(fields["num_hidden_layers"])))
    config = language_model_config(fields, moe_layers)
    assert [i for i in range(fields["num_hidden_layers"]) if config.is_moe_layer(i)] == moe_layers
    model = UniMoEForConditionalGeneration(config).eval()
    published = case.tensors("weights")
    state = from_published(published)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all("_connector." in key for key in left.missing_keys)
    back = to_published(state)
    assert back.keys() == {key for key in published if not key.endswith("inv_freq")}
    assert all(torch.equal(back[key], published[key]) for key in back)

    io, grads = case.tensors("io"), case.tensors("grads")
    mask = io["attention_mask"].bool()
    out = model(
        input_ids=io["input_ids"],
        attention_mask=io["attention_mask"],
        labels=io["labels"],
        output_hidden_states=True,
    )
    assert relative_error(out.logits[mask], io["logits"][mask]) < OUTPUT
    assert relative_error(out.loss, io["loss"]) < OUTPUT
    out.loss.backward()
    own = to_published(gradients_of(model))
    assert own.keys() == back.keys()
    check_norms(own, case.checks["grad_norms"])
    check_gradients(own, grads)


@pytest.mark.parametrize("hears", ["speech", "audio"])
def test_splice(hears):
    case, end_to_end = Case(f"splice_{hears}"), Case(f"end_to_end_{hears}")
    layers = moe_layers_of(end_to_end.tensors("weights"))
    model = published_model(end_to_end, hears, moe_layers=layers)
    batches = {path.stem: case.tensors(path.stem) for path in case.folder.glob("*.safetensors")}
    whole = next(io for io in batches.values() if "in.embed_tokens" in io)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(whole["in.embed_tokens"])
    for name, io in batches.items():
        if io is whole:
            rows = list(range(len(io["in.input_ids"])))
        else:
            # A row of the batch by itself, with labels and without.
            alone = io["in.input_ids"][0]
            rows = [row for row, ids in enumerate(whole["in.input_ids"]) if ids.equal(alone)]
            assert len(rows) == 1, name
            assert torch.equal(io["out.inputs_embeds"], io["out.inputs_embeds_nolabels"])
        own, embeddings = spliced(model, whole, rows, hears, io["out.labels"].shape[1])
        real = io["out.attention_mask"]
        assert torch.equal(own["attention_mask"].bool(), real), name
        assert torch.equal(own["labels"], io["out.labels"]), name
        assert torch.equal(embeddings[real], io["out.inputs_embeds"][real]), name


@pytest.mark.parametrize("hears", ["speech", "audio"])
def test_end_to_end(hears):
    case = Case(f"end_to_end_{hears}")
    weights = case.tensors("weights")
    model = published_model(case, hears, moe_layers=moe_layers_of(weights))
    io = case.tensors("forward")
    check_forward(case, model, io, weights, hears, io["out.loss"], io["out.logits_at_positions"])
    # 12 greedy tokens with the cache, which the published code could not use, for each row alone.
    generated = case.tensors("generate")
    for facts in case.checks["generation"]:
        row, length = facts["index"], len(facts["new_ids"])
        new, logits = generate_row(model, io, generated, row, weights, hears, length)
        assert new == facts["new_ids"], row
        assert generated[f"{row}.out.sequences"][0, -length:].tolist() == facts["new_ids"]
        assert relative_error(logits, generated[f"{row}.out.last_logits_per_step"]) < LOGITS, row
