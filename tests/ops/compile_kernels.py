"""Compiles every Triton kernel as its launcher launches it, for GPUs that need not be there.

The launchers run on tensors without data, for a GPU of the given kind: what they launch is
recorded and compiled ahead of time, with the tiles, constants and specialisations of a real call.
Prints one JSON line a kernel. Run by `test_kernels_build.py` in a process without TRITON_INTERPRET,
under which `triton.jit` yields interpreted functions.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial

import cases
import kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from unimoe_kernels._triton import launch, quantized_launch, tiles

# Processors and the bytes of shared memory that one block may have.
DEVICES = {
    80: launch.Device(80, 108, 163 * 1024),
    90: launch.Device(90, 132, 227 * 1024),
    100: launch.Device(100, 148, 227 * 1024),
    120: launch.Device(120, 170, 99 * 1024),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp_async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
}


def source_of(kernel, arguments):
    """What Triton compiles for these arguments, specialised as in a call."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_int and value == 1 and specialised):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            block = f"{TYPES[value.base.dtype]}{list(value.block_shape)}"
            signature[parameter.name] = f"tensordesc<{block}>"
            aligned = False
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = True
        else:
            assert is_int, f"{parameter.name} ({value!r}) must be a tensor or an integer"
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned and specialised:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def main(archs, everything):
    """Compiles for the archs given, such as 80 90; the same kernel twice only once."""
    for arch in archs:
        launch.STAND_IN = DEVICES[arch]
        done = set()
        for case, run in cases.all_launches(everything):
            for kernel, arguments, options, _ in kernels.record_launches(run):
                source = source_of(kernel, arguments)
                key = (source.hash(), tuple(sorted(options.items())))
                if key in done:
                    continue
                done.add(key)
                compiled = triton.compile(
                    source, target=GPUTarget("cuda", arch, 32), options=options
                )
                name = kernels.short_name(kernel)
                row = {"kernel": name, "case": case, "arch": arch, **options}
                row["descriptors"] = [
                    parameter
                    for parameter, value in arguments.items()
                    if isinstance(value, TensorDescriptor)
                ]
                # Where narrow products come in parts and no wide one is asked for.
                row["adds_only"] = arguments.get("BLOCK_C", 0) > 0 and not arguments.get(
                    "NEEDS_Y", 1
                )
                tile = [arguments[a] for a in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if a in arguments]
                print(json.dumps(row | {"tile": tile} | resources(compiled)), flush=True)


def resources(compiled):
    """Returns registers a thread, bytes of spilled and of shared memory, and instructions used."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path]
        usage = subprocess.check_output([*tool, "--dump-resource-usage", file.name], text=True)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        spilled = int(usage["STACK"]) + int(usage["LOCAL"])
        code = subprocess.check_output([*tool, "-sass", file.name], text=True) if spilled else ""
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(usage["REG"]),
        "spilled": spilled,
        "spills_in_loops": spills_in_loops(code),
        "shared": compiled.metadata.shared,
        "instructions": [name for name, text in INSTRUCTIONS.items() if re.search(text, ptx)],
    }


def spills_in_loops(code):
    """Counts accesses to spilled registers inside of innermost loops of disassembled code."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    # A loop is a jump back; an innermost one has no other inside.
    jumps = [(int(a, 16), re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)) for a, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    spills = [int(a, 16) for a, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in inner) for at in spills)


def print_variants(counts):
    """Prints for each number of tokens which variants of the kernels it would compile."""
    launch.STAND_IN = DEVICES[90]
    for count in counts:
        shape = cases.SHAPES[0]._replace(tokens=count)
        variants = {
            f"{kernel.__name__} {source_of(kernel, arguments).hash()} {sorted(options.items())}"
            for module in cases.with_launches()
            for kernel, arguments, options, _ in kernels.record_launches(
                partial(module.launch, shape)
            )
        }
        print(json.dumps({"tokens": count, "variants": sorted(variants)}))


def force_descriptors(wanted):
    """Lets every tile ask for descriptors, or none, whatever the choice for the GPU is."""
    for module, name in ((tiles, "analytic"), (tiles, "_measured"), (quantized_launch, "choose")):
        chosen = getattr(module, name)
        setattr(module, name, partial(_with_descriptors, chosen, wanted))


def _with_descriptors(chosen, wanted, *args):
    tile = chosen(*args)
    return tile and tile._replace(descriptors=wanted)


if __name__ == "__main__":
    for wanted, option in ((True, "--descriptors"), (False, "--pointers")):
        if option in sys.argv:
            force_descriptors(wanted)
    if sys.argv[1] == "--tokens":
        print_variants([int(count) for count in sys.argv[2:]])
        sys.exit()
    main([int(arch) for arch in sys.argv[1:] if arch.isdigit()], "--all" in sys.argv)
