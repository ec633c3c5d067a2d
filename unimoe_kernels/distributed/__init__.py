"""Expert parallelism on torch.distributed: experts on several ranks, besides data parallelism.

Start processes with `torchrun`, then `start_parallel`, `parallelize_moe`, and train or generate as
with one process. `docs/expert_parallelism.md` has the formulas.
"""

from unimoe_kernels.distributed.all_to_all import Transfer, all_to_all
from unimoe_kernels.distributed.checkpoint import discard_sharded, load_sharded, save_sharded
from unimoe_kernels.distributed.dispatcher import DispatchReport, ExpertDispatcher
from unimoe_kernels.distributed.failure import CollectiveError, attributed, collective
from unimoe_kernels.distributed.norm import clip_grad_norm
from unimoe_kernels.distributed.parallelize import (
    count_over_ranks,
    parallelize_moe,
    parameter_groups,
    unparallelize_moe,
)
from unimoe_kernels.distributed.start import finish_parallel, start_parallel
from unimoe_kernels.distributed.traffic import Traffic, count_traffic
from unimoe_kernels.distributed.weights import load_weights, save_weights, whole_state_dict

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
