"""Expert parallelism on torch.distributed, combined with data parallelism.

Start processes with `torchrun`, call `start_parallel` and `parallelize_moe`, and train or generate
as in one process. `docs/expert_parallelism.md` has the formulas. The package has two parts:
`dispatch` sends rows to experts on several ranks and synchronises weights and gradients; `running`
manages ranks: start and end, failures, checkpoints.
"""

from unimoe_kernels.distributed.dispatch.all_to_all import Transfer, all_to_all
from unimoe_kernels.distributed.dispatch.dispatcher import DispatchReport, ExpertDispatcher
from unimoe_kernels.distributed.dispatch.parallelize import (
    count_over_ranks,
    parallelize_moe,
    parameter_groups,
    unparallelize_moe,
)
from unimoe_kernels.distributed.dispatch.traffic import Traffic, count_traffic
from unimoe_kernels.distributed.dispatch.weights import load_weights, save_weights, whole_state_dict
from unimoe_kernels.distributed.running.checkpoint import (
    discard_sharded,
    load_sharded,
    save_sharded,
)
from unimoe_kernels.distributed.running.failure import CollectiveError, attributed, collective
from unimoe_kernels.distributed.running.norm import clip_grad_norm
from unimoe_kernels.distributed.running.start import finish_parallel, start_parallel

__all__ = [
    "CollectiveError",
    "DispatchReport",
    "ExpertDispatcher",
    "Traffic",
    "Transfer",
    "all_to_all",
    "attributed",
    "clip_grad_norm",
    "collective",
    "count_over_ranks",
    "count_traffic",
    "discard_sharded",
    "finish_parallel",
    "load_sharded",
    "load_weights",
    "parallelize_moe",
    "parameter_groups",
    "save_sharded",
    "save_weights",
    "start_parallel",
    "unparallelize_moe",
    "whole_state_dict",
]
