"""Host time of launching the Triton kernels of a layer, forward and backward.

The anchor, `jit`, launches through Triton's JIT: `kernel[grid](...)` with all arguments, rather
than a lookup of compiled kernels. Without a GPU, kernels are compiled for an H100 and the driver's
launch has no effect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from .candidates import Candidate, Work
from .shapes import LAYERS

GATE = ("silu", 7.0, 1.702)


def bench_launch(record, launch_case, device):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from unimoe_kernels._triton.launch import interpreted

    if interpreted():
        pytest.skip("Triton runs in its interpreter here")
    with _no_gpu() if device.type == "cpu" else nullcontext():
        call = layer(launch_case, device)
        record(
            launch_case,
            {"jit": lambda: _candidate(call, _through_jit), "ours": lambda: _candidate(call)},
            Work(0, 0),
        )


def _candidate(call: Callable[[], None], way: Callable = nullcontext) -> Candidate:
    def run() -> None:
        with way():
            call()

    return Candidate(run=run)


@contextmanager
def _through_jit() -> Iterator[None]:
    from unimoe_kernels._triton.planned import Launch

    def launch(self, *tensors):
        self._kernel[self._grid](*tensors, *self._sizes, **self._constants)

    with mock.patch.object(Launch, "__call__", launch):
        yield


def _no_gpu():
    from .stand_in_driver import stand_in

    return stand_in()


def layer(case, device) -> Callable[[], None]:
    """The launches of a layer's forward, and in training of its backward."""
    from unimoe_kernels.ops.expert_sort import kernel as expert_sort
    from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
    from unimoe_kernels.ops.moe_mlp import kernel, kernel_backward
    from unimoe_kernels.ops.permute import kernel as permute
    from unimoe_kernels.ops.unpermute import kernel as unpermute

    D, F, E, K = LAYERS[case.layer]
    T, training = case.tokens, case.mode == "training"
    like = {"device": device, "dtype": torch.bfloat16}
    x, grad = torch.randn(T, D, **like), torch.randn(T, D, **like)
    first, down = torch.randn(E, 2 * F, D, **like), torch.randn(E, D, F, **like)
    ids = torch.randint(0, E, (T * K,), device=device, dtype=torch.int32)
    scores = torch.rand(T, K, device=device)

    def call() -> None:
        order, inverse, _, offsets = expert_sort.expert_sort(ids, E)
        act, hidden = kernel.gated(x, first, None, offsets, order, K, GATE, training)
        y = grouped_mm.grouped_mm(act, down, offsets, None, tail=False)
        unpermute.unpermute(y, inverse, offsets, scores, K)
        if not training:
            return
        _, grad_hidden, weighted = kernel_backward.gated_backward(
            grad, down, None, scores, hidden, offsets, order, GATE, True, True, True
        )
        rows = permute.permute(grad, inverse, offsets, K)
        grouped_mm.grouped_mm_wgrad(rows, weighted, offsets, False)
        rows = permute.permute(x, inverse, offsets, K)
        grouped_mm.grouped_mm_wgrad(grad_hidden, rows, offsets, False)
        grad_rows = grouped_mm.grouped_mm(
            grad_hidden, first.transpose(1, 2), offsets, None, tail=False
        )
        unpermute.unpermute(grad_rows, inverse, offsets, None, K)

    return call
