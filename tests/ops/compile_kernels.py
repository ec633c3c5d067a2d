"""Compiles every Triton kernel for every supported GPU without one; prints JSON lines.

Run by `test_kernels_build.py` in a process without TRITON_INTERPRET, under which `triton.jit`
yields interpreted functions.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimoe_kernels.ops.expert_sort import kernel as expert_sort
from unimoe_kernels.ops.permute import kernel as permute
from unimoe_kernels.ops.unpermute import kernel as unpermute

POINTERS = {"bf16": "*bf16", "fp64": "*fp64"}


def sources():
    """Yields (name, kernel, signature of the plain arguments, constants)."""
    sort = {"BLOCK": expert_sort.BLOCK, "CHUNK": expert_sort.CHUNK}
    sizes = {"num_rows": "i32", "num_experts": "i32"}
    ids = {"ids_ptr": "*i32", "counts_ptr": "*i32"}
    yield "expert_sort.count", expert_sort.count_kernel, ids | sizes, sort
    places = dict.fromkeys(("ends_ptr", "row_order_ptr", "inverse_order_ptr"), "*i32")
    yield "expert_sort.place", expert_sort.place_kernel, ids | places | sizes, sort
    for name, pointer in POINTERS.items():
        orders = {"inverse_order_ptr": "*i32", "num_routed_ptr": "*i32"}
        accumulator = triton.language.float64 if name == "fp64" else triton.language.float32
        score = "*fp64" if name == "fp64" else "*fp32"
        block_d = unpermute.MAX_BLOCK_D
        yield (
            f"permute[{name}]",
            permute.permute_kernel,
            {"x_ptr": pointer, "out_ptr": pointer, "row_order_ptr": "*i32"}
            | {"num_routed_ptr": "*i32", "num_rows": "i32", "width": "i32"},
            {"TOP_K": 2, "BLOCK_N": permute.BLOCK_ELEMENTS // block_d, "BLOCK_D": block_d},
        )
        constants = {"TOP_K": 2, "BLOCK_D": block_d, "ACC_DTYPE": accumulator}
        yield (
            f"unpermute[{name}]",
            unpermute.unpermute_kernel,
            {"rows_ptr": pointer, "out_ptr": pointer, "scores_ptr": score, "width": "i32"} | orders,
            constants | {"HAS_SCORES": True},
        )
        grads = {"grad_rows_ptr": pointer, "grad_scores_ptr": score, "scores_ptr": score}
        yield (
            f"unpermute.backward[{name}]",
            unpermute.unpermute_backward_kernel,
            {"grad_ptr": pointer, "rows_ptr": pointer, "width": "i32"} | grads | orders,
            constants,
        )


def main(archs):
    """Compiles for the archs given, such as 80 90."""
    for name, kernel, arguments, constants in sources():
        types = arguments | dict.fromkeys(constants, "constexpr")
        signature = {argument: types[argument] for argument in kernel.arg_names}
        for arch in archs:
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            print(json.dumps({"kernel": name, "arch": arch, **resources(compiled)}), flush=True)


def resources(compiled):
    """Returns registers a thread and bytes of spilled and of shared memory of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    usage = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
