"""Launches the kernels of a layer twice on a GPU that is not there, and says what was launched.

Run by `test_launches.py` in a process without TRITON_INTERPRET, where kernels are compiled.
"""

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parents[2]))

from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.bench_launch import layer
from benchmarks.shapes import LAUNCH
from benchmarks.stand_in_driver import stand_in
from unimoe_kernels.ops.grouped_mm_quantized import kernel as quantized
from unimoe_kernels.ops.permute import kernel as permute
from unimoe_kernels.ops.swiglu import kernel as swiglu
from unimoe_kernels.ops.topk_router import kernel as router
from unimoe_kernels.ops.topk_router import kernel_backward as router_backward


def described(value):
    """What of an argument both ways must agree on; results are new tensors in each call."""
    if isinstance(value, TensorDescriptor):
        fields = (value.shape, value.strides, value.block_shape, value.padding)
        return f"descriptor of {value.base.dtype} {[list(f) for f in fields[:3]]} {fields[3]}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} {value.data_ptr() % 16}"
    return repr(value)


def launched(driver, run):
    """(function, grid, arguments) of each launch of a call."""
    driver.launches.clear()
    run()
    return [[str(one[4]), list(one[:3]), *map(described, one[9:])] for one in driver.launches]


def route():
    logits, mask = torch.randn(40, 16), torch.rand(40) > 0.5
    options = ("softmax_topk_renorm", 1.0, "all")
    scores, ids, *_ = router.topk_router(logits, None, mask, 2, options[0], 1, 1, *options[1:])
    zero = torch.zeros(())
    router_backward.topk_router_backward(scores, zero, zero, logits, ids, mask, *options)


def activate():
    rows = torch.randn(6, 32)
    swiglu.swiglu_backward(swiglu.swiglu(rows, "silu", 7.0, 1.7), rows, "silu", 7.0, 1.7)


def activate_unaligned():
    rows = torch.randn(6 * 32 + 1)[1:].view(6, 32)
    swiglu.swiglu(rows, "silu", 7.0, 1.7)


def copy(dtype):
    order, offsets = torch.arange(16).int().view(8, 2), torch.tensor([0, 9, 16]).int()
    permute.permute(torch.randn(8, 64).to(dtype), order.flatten(), offsets, 2)


def multiply_quantized(scales):
    weight = torch.randint(-9, 9, (2, 32, 64), dtype=torch.int8)
    sizes = torch.rand(2, 32, 2).to(scales)
    offsets = torch.tensor([0, 5, 8]).int()
    quantized.grouped_mm_quantized(
        torch.randn(8, 64).bfloat16(), weight, sizes, None, offsets, None, False
    )


def correct(bias):
    options = (2, "sigmoid_renorm", 1, 1, 1.0, "all")
    router.topk_router(torch.randn(40, 16), torch.rand(16).to(bias), None, *options)


def main():
    cpu = torch.device("cpu")
    calls = {str(case): layer(case, cpu) for case in LAUNCH}
    calls |= {"router": route, "swiglu": activate, "unaligned swiglu": activate_unaligned}
    for dtype in (torch.bfloat16, torch.float32):
        calls |= {
            f"{run.__name__} {dtype}": functools.partial(run, dtype)
            for run in (copy, multiply_quantized, correct)
        }
    with stand_in() as driver:
        driver.keeps = True
        for name, run in calls.items():
            first = launched(driver, run)
            refuse = mock.Mock(side_effect=AssertionError("through the front door"))
            with mock.patch.object(JITFunction, "run", refuse):
                second = launched(driver, run)
            print(json.dumps({"name": name, "first": first, "second": second}), flush=True)


if __name__ == "__main__":
    main()
