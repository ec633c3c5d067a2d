"""Checks shared by golden cases: outputs, gradients and generated tokens of a model."""

import torch
from in_memory import to_published
from published import encoded_media, expanded_rows, padded_batch

from unimoe_kernels.testing import relative_error

OUTPUT, GRADIENT, LOGITS = 1e-5, 1e-4, 1e-4
"""Relative errors that are allowed in outputs, gradients, and logits of whole models."""


def gradients_of(module):
    """Gradients of the parameters that have one, by name."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check_norms(gradients, norms):
    """Compares norms of gradients by name."""
    for name, norm in norms.items():
        assert abs(gradients[name].norm().item() / norm - 1) < GRADIENT, name


def check_gradients(gradients, expected):
    """Compares gradients by name; None stands for zeros, and zeros for None."""
    for name, value in expected.items():
        actual = gradients[name]
        if actual is None or not value.any():
            # An expert without tokens, or a router of one choice.
            assert actual is None or not actual.any(), name
        else:
            assert relative_error(actual, value) < GRADIENT, name


def check_forward(case, model, io, weights, hears, loss, logits):
    """Compares loss, logits and norms of gradients over the media of a case."""
    rows = expanded_rows(io, model.config, hears)
    mask = io["out.spliced_attention_mask"]
    batch = padded_batch(rows, mask.shape[1])
    assert torch.equal(batch["attention_mask"].bool(), mask)
    out = model(**batch, **encoded_media(io, weights, hears))
    positions = io["logit_positions"]
    real = mask[:, positions]
    assert real.any()
    assert relative_error(out.logits[:, positions][real], logits[real]) < LOGITS
    assert relative_error(out.loss, loss) < OUTPUT
    if "grad_norms" in case.checks:
        model.zero_grad()
        out.loss.backward()
        found = to_published(gradients_of(model), hears)
        # The bias of an attention's keys changes nothing: what is left is rounding.
        norms = {k: n for k, n in case.checks["grad_norms"].items() if k in found and n > 1e-6}
        assert len(norms) > 20
        check_norms(found, norms)


def generate_row(model, io, generated, row, weights, hears, length):
    """Generates `length` tokens for one row alone: their ids, and the logits of each."""
    prompt = {
        "in.input_ids": generated[f"{row}.in.input_ids"],
        "in.features_mask": io["in.features_mask"][row : row + 1],
    }
    batch = padded_batch(expanded_rows(prompt, model.config, hears))
    del batch["labels"]
    out = model.generate(
        **batch,
        **encoded_media(io, weights, hears, [row]),
        max_new_tokens=length,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, batch["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


def spliced(model, io, rows, hears, width):
    """Our batch of some rows of a case, and its embeddings with the soft tokens of the case."""
    media = {}
    for kind in ("image", "video"):
        chosen = [row for row in rows if io[f"in.{kind}_mask"][row]]
        if chosen:
            media[kind] = io[f"mid.{kind}_tokens_all_rows"][chosen]
    chunks = [io["mid.audio_chunk_tokens"][r][io["in.features_mask"][r] > 0] for r in rows]
    media[hears] = torch.cat(chunks)
    expanded = expanded_rows(io, model.config, hears)
    own = padded_batch([expanded[row] for row in rows], width)
    return own, model.model.splice(own["input_ids"], media)
