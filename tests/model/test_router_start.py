"""The router's start: every modality's mean token prefers its own expert."""

import torch

from unimoe_model.training.router_start import mean_ffn_inputs, router_weights


def test_every_mean_prefers_its_own_expert_by_the_strength():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, 16, generator=generator) + 2.0
    weights = router_weights(means, strength=3.0)
    assert weights.shape == (3, 4, 16)
    for layer in range(3):
        logits = means[:, layer] @ weights[layer].T
        assert torch.equal(logits.argmax(1), torch.arange(4))
        torch.testing.assert_close(logits.diagonal(), torch.full((4,), 3.0))


def test_what_all_modalities_share_prefers_no_expert():
    means = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1)) + 2.0
    common = means.mean(0)
    logits = torch.einsum("led,ld->le", router_weights(means, strength=3.0), common)
    torch.testing.assert_close(logits, torch.zeros(2, 4), atol=1e-5, rtol=0)


def test_equal_means_give_finite_weights():
    weights = router_weights(torch.ones(2, 1, 8), strength=3.0)
    assert torch.isfinite(weights).all()


def test_means_are_over_real_tokens_only(tiny_model):
    model = tiny_model(num_experts=0)
    ids = torch.randint(20, 200, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    means = mean_ffn_inputs(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = [
        mean_ffn_inputs(model, [{"input_ids": row, "attention_mask": torch.ones_like(row)}])
        for row in (ids[:1], ids[1:, :4])
    ]
    torch.testing.assert_close(means, (6 * alone[0] + 4 * alone[1]) / 10, atol=1e-5, rtol=1e-4)
