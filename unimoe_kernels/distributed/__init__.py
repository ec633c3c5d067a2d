"""Expert parallelism on torch.distributed: experts on several ranks, besides data parallelism.

Start processes with `torchrun`, then `start_parallel`, `parallelize_moe`, and train or generate as
with one process. `docs/expert_parallelism.md` has the formulas.
"""

from unimoe_kernels.distributed.all_to_all import Transfer, all_to_all
from unimoe_kernels.distributed.dispatcher import DispatchReport, ExpertDispatcher
from unimoe_kernels.distributed.failure import CollectiveError, attributed, collective
from unimoe_kernels.distributed.norm import clip_grad_norm
from unimoe_kernels.distributed.parallelize import (
    count_over_ranks,
    parallelize_moe,
    parameter_groups,
)
from unimoe_kernels.distributed.start import finish_parallel, start_parallel
from unimoe_kernels.distributed.traffic import Traffic, count_traffic

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
    "finish_parallel",
    "parallelize_moe",
    "parameter_groups",
    "start_parallel",
]
