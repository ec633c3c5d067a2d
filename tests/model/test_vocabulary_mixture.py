"""Connector outputs as weighted means of the LLM's embeddings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels.testing import relative_error
from unimoe_model.connectors import vocabulary, vocabulary_mixture


def reference(outputs, table, sharpness):
    """The mixtures by loops."""
    mean = table.mean(0)
    mixtures = []
    for own in outputs.reshape(-1, table.shape[1]):
        cosines = [torch.cosine_similarity(own - mean, row - mean, dim=0) for row in table]
        weights = (sharpness * torch.stack(cosines)).softmax(0)
        mixtures.append(sum(weight * row for weight, row in zip(weights, table, strict=True)))
    return torch.stack(mixtures).view(outputs.shape)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    size=st.integers(2, 9),
    width=st.integers(2, 5),
    sharpness=st.sampled_from([0.5, 20.0]),
    rows=st.integers(1, 10),
    together=st.integers(1, 10),
)
def test_mixtures_and_gradients_are_those_of_loops(shape, size, width, sharpness, rows, together):
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(*shape, width, generator=generator, dtype=torch.float64) + 1
    table = torch.randn(size, width, generator=generator, dtype=torch.float64) + 1
    outputs.requires_grad_(), table.requires_grad_()
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_ROWS", rows)
        patch.setattr(vocabulary, "_OUTPUTS", together)
        found = vocabulary_mixture(outputs, table, sharpness)
        assert found.shape == outputs.shape
        if not outputs.numel():
            return
        ours = torch.autograd.grad((found * weights).sum(), (outputs, table))
    expected = reference(outputs, table, sharpness)
    assert relative_error(found, expected) < 1e-9
    theirs = torch.autograd.grad((expected * weights).sum(), (outputs, table))
    for own, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-12
        assert (own - other).norm() < 1e-6 * other.norm().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    table = torch.randn(50, 16).to(dtype)
    outputs = (table[:7] + 0.5 * torch.randn(7, 16)).to(dtype)
    found = vocabulary_mixture(outputs, table, 20)
    assert found.dtype == dtype
    expected = reference(outputs.double(), table.double(), 20)
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 0.02)


def test_weights_of_many_outputs_are_not_stored():
    stored = []

    def record(tensor):
        stored.append(tensor.numel())
        return tensor

    outputs = torch.randn(3 * vocabulary._OUTPUTS, 4, requires_grad=True)
    table = torch.randn(100, 4)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        mixtures = vocabulary_mixture(outputs, table, 20.0)
    mixtures.sum().backward()
    assert outputs.grad.abs().max() > 0
    arguments = outputs.numel() + 3 * (table.numel() + table.shape[1])  # of three parts
    assert sum(stored) <= arguments


def test_a_sharp_mixture_is_the_most_similar_embedding():
    table = torch.randn(20, 8)
    outputs = table[[3, 17]] + 0.1 * torch.randn(2, 8)
    assert relative_error(vocabulary_mixture(outputs, table, 1e4), table[[3, 17]]) < 1e-3


def test_the_llm_reads_mixtures_of_every_kind(tiny_model, media_prompt, features):
    kinds = ("image", "video", "speech", "audio")
    own = {f"{kind}_features": features(kind) for kind in kinds}
    ids = media_prompt(*kinds)
    plain, mixed = tiny_model(), tiny_model(vocabulary_sharpness=9.0)
    table = plain.get_input_embeddings().weight
    soft = plain.connector_outputs(ids, **own)
    is_media = torch.isin(ids, torch.tensor(list(plain.config.media_token_ids.values())))
    soft[is_media] = vocabulary_mixture(soft[is_media], table, 9.0)
    with torch.no_grad():
        expected = plain(inputs_embeds=soft).logits
        assert relative_error(mixed(input_ids=ids, **own).logits, expected) < 1e-5
        assert relative_error(plain(input_ids=ids, **own).logits, expected) > 1e-2
        assert torch.equal(mixed(input_ids=ids[:, :1]).logits, plain(input_ids=ids[:, :1]).logits)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_sharpness_that_is_not_positive_is_refused(tiny_config, value):
    with pytest.raises(ValueError, match=r"vocabulary_sharpness \(.*\) must be above 0"):
        tiny_config(vocabulary_sharpness=value)
