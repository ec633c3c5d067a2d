"""Scenarios of `test_dispatcher.py`: what a layer computes on several ranks and in one process."""

import torch
import torch.distributed as dist
from op_group import D, E, gathered, layer, message

from unimoe_kernels import MoE, quantize_experts
from unimoe_kernels.distributed import count_traffic, parallelize_moe, unparallelize_moe
from unimoe_kernels.testing import relative_error


def beside_one_process(r, moe, x, **parallel):
    """Worst error of output and gradients of x, beside the same layer in one process."""
    x.requires_grad_()
    expected = moe(x)
    expected.square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh, **parallel)
    y = moe(x)
    y.square().sum().backward()
    return max(relative_error(y, expected), relative_error(x.grad, grad))


def sentinels(r):
    """Choices of null experts and dropped choices have no target rank and are not sent."""
    options = {"mode": "sparsemixer_renorm", "top_p": 0.7, "num_null_experts": 1}
    moe, x = layer(r, **options, num_shared_experts=2, shared_scores="softmax")
    error = beside_one_process(r, moe, x, num_chunks=2)
    with torch.no_grad(), count_traffic() as moved:
        _, routed = moe(x, return_router=True)
    own = E // r.world
    away = (routed.ids < E) & (routed.ids // own != r.rank)
    return [error, moved.sent - moved_rows(r, routed.ids) * D * 8, int(away.sum())]


def moved_rows(r, ids):
    """Rows that leave with these choices, plus those that come back as answers: what is sent."""
    own = E // r.world
    leave = ((ids < E) & (ids // own != r.rank)).sum()
    tables = [None] * r.world
    dist.all_gather_object(
        tables, [int(((ids < E) & (ids // own == t)).sum()) for t in range(r.world)]
    )
    answered = sum(table[r.rank] for source, table in enumerate(tables) if source != r.rank)
    return int(leave) + answered


def lora(r):
    moe, x = layer(r)
    torch.manual_seed(1)
    moe.experts.add_lora(3, freeze_base=False)
    with torch.no_grad():
        for adapter in moe.experts.expert_lora.values():
            adapter.lora_B.normal_()
    return beside_one_process(r, moe, x)


def merged_lora(r):
    """LoRA of experts on several ranks is merged there; none is added there."""
    moe, x = layer(r)
    refused = []
    torch.manual_seed(1)
    moe.experts.add_lora(3)
    with torch.no_grad():
        for adapter in moe.experts.expert_lora.values():
            adapter.lora_B.normal_()
        expected = moe(x)
        parallelize_moe(moe, r.mesh)
        moe.experts.merge_and_unload_lora()
        refused.append(message(lambda: moe.experts.add_lora(3)))
        return [relative_error(moe(x), expected), *refused]


def autocast(r):
    """Rows travel in the dtype that experts work in."""
    moe, x = layer(r, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = moe(x)
        parallelize_moe(moe, r.mesh)
        with count_traffic() as moved:
            y, routed = moe(x, return_router=True)
    return [relative_error(y, expected), moved.sent - moved_rows(r, routed.ids) * D * 2]


def compiled_layer(r):
    """The dispatch is left out of the graph; what is around it is compiled."""
    moe, x = layer(r, load_balancing_coef=0.1, aux_loss="inject")
    parallelize_moe(moe, r.mesh)
    x.requires_grad_()
    expected = moe(x)
    expected.square().sum().backward()
    grad, x.grad = x.grad, None
    y = torch.compile(moe, backend="aot_eager")(x)
    y.square().sum().backward()
    return max(relative_error(y, expected), relative_error(x.grad, grad))


def recomputation(r):
    moe, x = layer(r)
    again = torch.utils.checkpoint.checkpoint
    x.requires_grad_()
    moe(x).square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh, num_chunks=2)
    again(moe, x, use_reentrant=False).square().sum().backward()
    return relative_error(x.grad, grad)


def quantized(r):
    """Quantised experts with LoRA: output, gradients of x and of LoRA, and the parts held here."""
    torch.manual_seed(0)
    moe = MoE(32, 64, E, 3)
    quantize_experts(moe, "int4", group_size=32, zero_points=True)
    moe.experts.add_lora(3)
    with torch.no_grad():
        for adapter in moe.experts.expert_lora.values():
            adapter.lora_B.normal_()
    torch.manual_seed(100 + r.rank)
    x = torch.randn(5 + 3 * r.rank, 32, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    expected = moe(x)
    expected.square().sum().backward()
    x_grad, x.grad = x.grad, None
    grads = {}
    for name, parameter in moe.named_parameters():
        if parameter.requires_grad:
            grads[name] = sum(gathered(parameter.grad, r))
    moe.zero_grad()
    parallelize_moe(moe, r.mesh)
    held = moe.experts.gate_up_proj.weight.nbytes
    y = moe(x)
    y.square().sum().backward()
    errors = [relative_error(y, expected), relative_error(x.grad, x_grad)]
    for name, parameter in moe.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            errors.append(relative_error(grad, grads[name]))
    unparallelize_moe(moe)
    same = all(torch.equal(tensor, before[name]) for name, tensor in moe.state_dict().items())
    return [max(errors), held * r.world / moe.experts.gate_up_proj.weight.nbytes, same]


def quantized_shards(r):
    moe = MoE(32, 64, E, 3)
    quantize_experts(moe, "int8")
    return message(lambda: parallelize_moe(moe, r.data_mesh, data="shard"))


def second_derivatives(r):
    moe, x = layer(r)
    parallelize_moe(moe, r.mesh)
    penalty = moe(x.requires_grad_()).square().sum()
    return message(lambda: torch.autograd.grad(penalty, x, create_graph=True))


def frozen_on_one_rank(r):
    """The tokens of rank 0 need no gradient; it still takes part in the backward of the others."""
    moe, x = layer(r)
    moe.experts.requires_grad_(False)
    x.requires_grad_(r.rank > 0)
    moe(x).square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh)
    moe(x).square().sum().backward()
    return max(gathered(relative_error(x.grad, grad) if r.rank else 0.0, r))


SCENARIOS = (
    sentinels,
    quantized,
    quantized_shards,
    lora,
    merged_lora,
    autocast,
    compiled_layer,
    recomputation,
    second_derivatives,
    frozen_on_one_rank,
)
