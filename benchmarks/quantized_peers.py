"""Peers with quantised experts, each in a process of its own (`remote.RemoteLayer`).

They round activations to int8 as well, so that their output is compared with a wider tolerance.
Peers that are not installed, or that the processor does not support, are omitted with the reason.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from unimoe_kernels import quantize_weight
from unimoe_kernels.testing import relative_error

from .candidates import UnavailableError
from .problem import Problem

Layer = Callable[[], None]

# Rounding of weights and activations together; the error of an output of zeros is 1.
INT8_TOLERANCE, INT4_TOLERANCE = 0.1, 0.5


def zentorch_int8(problem: Problem) -> Layer:
    """AMD's fused layer for CPUs: int8 weights with a scale per row, activations in int8."""
    import_zentorch()
    experts = problem.moe.experts
    first, down = (quantize_weight(w, "int8") for w in (experts.gate_up_proj, experts.down_proj))
    x_TD = problem.x[0].contiguous()
    y_TD = torch.empty_like(x_TD)
    # It packs the weights in place in its first call.
    values = [weight.values.clone() for weight in (first, down)]
    scales = [weight.scales[..., 0].contiguous() for weight in (first, down)]

    def run() -> None:
        scores_TK, ids_TK = route(problem, x_TD)
        torch.ops.zentorch.zentorch_fused_moe(
            y_TD, x_TD, *values, None, None, scores_TK, ids_TK.int(), False, "silu", *scales
        )

    return _checked("zentorch-int8", problem, run, y_TD, INT8_TOLERANCE)


def import_zentorch() -> None:
    """Registers zentorch's operators.

    Raises:
        UnavailableError: If it cannot be imported.
    """
    try:
        import zentorch  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"zentorch does not import: {error}") from error


def kt_kernel(problem: Problem, four_bits: bool) -> Layer:
    """KTransformers' experts: int8 or int4 weights with a scale per row, activations in int8.

    Its Python layer requires CUDA's pinned memory; this calls the extension under it.
    """
    name = f"kt-{'int4' if four_bits else 'int8'}"
    try:
        from kt_kernel import kt_kernel_ext
    except ImportError as error:
        raise UnavailableError(f"kt-kernel does not import: {error}") from error
    moe_class = getattr(kt_kernel_ext.moe, "AMXInt4_MOE" if four_bits else "AMXInt8_MOE", None)
    if moe_class is None:
        raise UnavailableError(f"kt-kernel has no {name} for this processor")
    D, F, E, K = problem.layer
    experts, x_TD = problem.moe.experts, problem.x[0].contiguous()
    gate, up = (part.contiguous() for part in experts.gate_up_proj.detach().chunk(2, dim=1))
    down, y_TD = experts.down_proj.detach().contiguous(), torch.empty_like(x_TD)
    on_gpu_E, order_E = torch.zeros(E, dtype=torch.bool), torch.arange(E)
    with _quiet():
        pool = _kt_pool(torch.get_num_threads())
        config = kt_kernel_ext.moe.MOEConfig(E, K, D, F, on_gpu_E.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, pool.backend_, max(32, len(x_TD))
        config.save, config.load = False, False
        config.gate_proj, config.up_proj = gate.data_ptr(), up.data_ptr()
        config.down_proj = down.data_ptr()
        moe = moe_class(config)
        pool.submit(moe.load_weights_task(order_E.data_ptr()))
        pool.sync()
    rows = torch.tensor([len(x_TD)], dtype=torch.int32)

    def run() -> None:
        scores_TK, ids_TK = route(problem, x_TD)
        pointers = (t.data_ptr() for t in (ids_TK, scores_TK, x_TD, y_TD))
        pool.submit(moe.forward_task(rows.data_ptr(), K, *pointers, False))
        pool.sync()

    # The extension keeps pointers to these.
    run.kept = (on_gpu_E, gate, up, down)
    return _checked(name, problem, run, y_TD, INT4_TOLERANCE if four_bits else INT8_TOLERANCE)


@functools.cache
def _kt_pool(threads: int):
    from kt_kernel import kt_kernel_ext

    workers = kt_kernel_ext.WorkerPoolConfig()
    workers.subpool_count, workers.subpool_numa_map = 1, [0]
    workers.subpool_thread_count = [threads]
    return kt_kernel_ext.CPUInfer(workers)


def route(problem: Problem, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scores (float32) and expert ids (int64), `[T, K]`, for peers without a router."""
    chosen_TK, ids_TK = torch.topk(x_TD @ problem.moe.router.weight.T, problem.layer.K)
    return chosen_TK.softmax(-1, dtype=torch.float32), ids_TK


def _checked(
    name: str, problem: Problem, run: Layer, y_TD: torch.Tensor, tolerance: float
) -> Layer:
    run_without_gradients = torch.no_grad()(run)
    run_without_gradients()
    expected = problem.moe(problem.x)[0, problem.clear].detach().float()
    error = relative_error(y_TD[problem.clear].float(), expected)
    assert error < tolerance, f"{name}: output has relative error {error:.2g}, limit {tolerance}"
    return run_without_gradients


@contextmanager
def _quiet() -> Iterator[None]:
    """Discards what an extension prints while it is set up."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


QUANTIZED_LAYERS: dict[str, Callable[[Problem], Layer]] = {
    "zentorch-int8": zentorch_int8,
    "kt-int8": functools.partial(kt_kernel, four_bits=False),
    "kt-int4": functools.partial(kt_kernel, four_bits=True),
}
