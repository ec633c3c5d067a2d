"""Calls of the public names as users write them, for mypy; nothing here is run."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import unimoe_kernels
import unimoe_model
from unimoe_kernels import (
    ExpertSort,
    MoE,
    RouterOutput,
    TopKRouterOutput,
    available_backends,
    expert_sort,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    pack_weights,
    permute,
    swiglu,
    topk_router,
    unpermute,
    use_backend,
)
from unimoe_kernels.distributed import all_to_all, start_parallel
from unimoe_kernels.testing import relative_error


def layers(x: Tensor) -> None:
    moe = MoE(64, 128, num_experts=8, top_k=2, mode="softmax_topk", dtype=torch.float32)
    assert_type(moe(x), Tensor)
    y, routed = moe(x, return_router=True)
    assert_type(routed, RouterOutput)
    assert_type(moe.aux_loss_of(routed), Tensor)
    assert_type(MoE.from_ffns([nn.Linear(1, 1)], top_k=1), MoE)
    assert_type(pack_weights(moe), int)
    moe.experts.add_lora(rank=4, alpha=8)
    moe.router.update_correction_bias(routed.tokens_per_expert)
    assert_type(relative_error(y, x), float)


def operators(x: Tensor, weight: Tensor, lora: Tensor) -> None:
    routed = topk_router(x, 2)
    assert_type(routed, TopKRouterOutput)
    sort = expert_sort(routed.ids, 8)
    assert_type(sort, ExpertSort)
    rows = permute(x, sort, 2)
    assert_type(rows, Tensor)
    assert_type(swiglu(grouped_mm(rows, weight, sort.expert_offsets), "gelu"), Tensor)
    assert_type(grouped_lora(rows, lora, lora, sort.expert_offsets), Tensor)
    assert_type(unpermute(rows, sort, 2, routed.scores), Tensor)
    assert_type(moe_mlp(x, weight, weight, routed.ids, routed.scores), Tensor)
    assert_type(available_backends("permute", "cpu"), tuple[str, ...])
    with use_backend("reference"):
        pass


def ranks(x: Tensor) -> None:
    mesh = start_parallel(1, 2)
    assert_type(all_to_all(x, [1, 1], [1, 1], mesh.get_group("ep")), Tensor)


def models() -> None:
    answerer = unimoe_model.Answerer.from_pretrained("folder")
    assert_type(answerer, unimoe_model.Answerer)
    conversation = unimoe_model.Conversation(answerer.model, answerer.processor)
    for piece in conversation.reply("what is it?"):
        assert_type(piece, str)
    settings: Any = {"num_experts": 0}
    unimoe_model.UniMoEConfig(**settings)
    assert_type(unimoe_kernels.__version__, str)
