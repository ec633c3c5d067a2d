"""Builds the one extension, `unimoe_kernels._C`; everything else is in pyproject.toml.

Environment:
    UNIMOE_SKIP_EXT=1     pure-Python install; torch is not imported.
    UNIMOE_CUDA=1 | 0     demand or refuse the CUDA sources (default: where torch and nvcc allow).
    TORCH_CUDA_ARCH_LIST  architectures to compile for, such as "8.0+PTX;9.0a".
    UNIMOE_SANITIZE=1     with AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
    CXX, MAX_JOBS         the C++ compiler; how many files to compile at a time.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the binary may use; both compilers must see it.
TORCH_TARGET_VERSION = "0x020b000000000000"
MINIMUM_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "9.0a", "10.0", "12.0")
# Capabilities that have instructions of their own (wgmma), under the name that compiles them. Such
# code runs on every device of that capability, and its PTX on no other.
OWN_ARCHS = {"9.0": "9.0a"}
# No contraction: a multiply and an add round as they do in the plain torch reference.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]
# Whatever is undefined ends the process.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo", "--fmad=false"]
# Commands that compile nothing. An sdist takes csrc from MANIFEST.in, so it needs no torch either.
COMMANDS_WITHOUT_EXTENSION = {"egg_info", "sdist", "clean"}


class Decision(NamedTuple):
    """What is built, and why."""

    extension: bool
    cuda: bool
    reason: str


def read_switch(environ, name):
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"unimoe: {name} ({value!r}) must be 0, 1 or unset")
    return value


def find_cxx(environ):
    """Returns the C++ compiler that torch and setuptools will both find, or None."""
    named = environ.get("CXX")
    if named:
        return named if shutil.which(named.split()[0], path=environ.get("PATH")) else None
    python_cxx = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    for name in (python_cxx, "c++", "g++", "clang++"):
        if shutil.which(name, path=environ.get("PATH")):
            return name
    return None


def nvcc_version(cuda_home):
    """Returns nvcc's (major, minor), or None where nvcc cannot be run."""
    try:
        output = subprocess.run(
            [Path(cuda_home) / "bin" / "nvcc", "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else None


def decide_cuda(switch, torch_cuda, cuda_home, nvcc):
    """Decides whether the CUDA sources are built.

    Whether a GPU is visible plays no part: wheels are built on machines without one.

    Args:
        switch: value of UNIMOE_CUDA: "", "0" or "1".
        torch_cuda: `torch.version.cuda`, None for a CPU build of torch.
        cuda_home: the toolkit's folder, or None.
        nvcc: (major, minor) of its nvcc, or None.

    Returns:
        (build, reason). Exits where UNIMOE_CUDA=1 cannot be met.
    """
    if switch == "0":
        return False, "UNIMOE_CUDA=0"
    if torch_cuda is None:
        problem = "this torch was built without CUDA (torch.version.cuda is None)"
    elif cuda_home is None:
        problem = "no CUDA toolkit was found (set CUDA_HOME)"
    elif nvcc is None:
        problem = f"{cuda_home}/bin/nvcc cannot be run"
    elif nvcc[0] != int(torch_cuda.split(".")[0]):
        problem = f"nvcc is {nvcc[0]}.{nvcc[1]} but torch was built with CUDA {torch_cuda}"
    else:
        return True, f"torch has CUDA {torch_cuda}, nvcc {nvcc[0]}.{nvcc[1]} is in {cuda_home}"
    if switch == "1":
        sys.exit(f"unimoe: UNIMOE_CUDA=1 cannot be met: {problem}")
    return False, problem


def decide(environ):
    """Decides what to build, from the environment and (unless it is skipped) from torch."""
    skip = read_switch(environ, "UNIMOE_SKIP_EXT") == "1"
    cuda_switch = read_switch(environ, "UNIMOE_CUDA")
    reason = None
    if skip:
        reason = "UNIMOE_SKIP_EXT=1"
    elif find_cxx(environ) is None:
        reason = f"no C++ compiler on PATH (CXX={environ.get('CXX', '')!r})"
    if reason is not None:
        if cuda_switch == "1":
            sys.exit(f"unimoe: UNIMOE_CUDA=1 cannot be met: {reason}")
        return Decision(extension=False, cuda=False, reason=reason)

    torch = import_torch()
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = nvcc_version(CUDA_HOME) if CUDA_HOME else None
    cuda, reason = decide_cuda(cuda_switch, torch.version.cuda, CUDA_HOME, nvcc)
    return Decision(extension=True, cuda=cuda, reason=reason)


def import_torch():
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"unimoe: the extension is compiled against the torch you run, which cannot be "
            f"imported here ({error}): install torch, then `pip install --no-build-isolation .` "
            f"(or UNIMOE_SKIP_EXT=1 for a pure-Python install)"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        sys.exit(f"unimoe: torch ({torch.__version__}) must be at least 2.11")
    return torch


def choose_archs(visible, supported):
    """Returns a TORCH_CUDA_ARCH_LIST: the visible devices' own, else what nvcc has of the default.

    Args:
        visible: capabilities of the devices, such as ["9.0"]; empty on a machine without.
        supported: what `nvcc --list-gpu-arch` names, such as ["8.0", "9.0"].
    """
    if visible:
        capabilities = sorted(set(visible), key=float)
        return ";".join(OWN_ARCHS.get(capability, capability) for capability in capabilities)
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if arch.removesuffix("a") in supported]
    if not archs:
        sys.exit(f"unimoe: nvcc must support one of {', '.join(DEFAULT_CUDA_ARCHS)}")
    portable = [arch for arch in archs if not arch.endswith("a")]
    if portable:
        archs[archs.index(portable[-1])] += "+PTX"
    return ";".join(archs)


def cuda_archs(torch, cuda_home):
    listed = subprocess.run(
        [Path(cuda_home) / "bin" / "nvcc", "--list-gpu-arch"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    supported = [f"{a}.{b}" for a, b in re.findall(r"compute_(\d+)(\d)\b", listed)]
    count = torch.cuda.device_count()
    visible = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(count)]
    return choose_archs(visible, supported)


def extension(with_cuda):
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    # Paths relative to the root: setuptools refuses absolute ones in an sdist's file list.
    sanitize = SANITIZE_FLAGS if read_switch(os.environ, "UNIMOE_SANITIZE") == "1" else []
    sources = [ROOT / "csrc" / "library.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    archs = ""
    if with_cuda:
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        defines.append("-DUSE_CUDA")  # the C shim for the current stream is behind it
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(torch, CUDA_HOME))
    # nvcc gets no flag of ours with "arch" in it: torch would then drop every -gencode.
    record = {
        "UNIMOE_BUILD_FLAGS": " ".join(CXX_FLAGS + sanitize),
        "UNIMOE_BUILD_CUDA": torch.version.cuda if with_cuda else "",
        "UNIMOE_BUILD_ARCHS": archs,
    }
    return (CUDAExtension if with_cuda else CppExtension)(
        "unimoe_kernels._C",
        [str(source.relative_to(ROOT)) for source in sources],
        include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
        extra_compile_args={
            "cxx": [
                *CXX_FLAGS,
                *sanitize,
                *defines,
                *(f'-D{name}="{value}"' for name, value in record.items()),
            ],
            "nvcc": NVCC_FLAGS + defines,
        },
        extra_link_args=sanitize,
    )


def pybind11_include():
    """Returns pybind11's own headers; without the package, those inside torch are used."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def build_extension_command():
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    return BuildExtension.with_options(use_ninja=is_ninja_available())


def main():
    if COMMANDS_WITHOUT_EXTENSION & set(sys.argv):
        setup()
        return
    # A virtual environment that is used without being activated has its ninja here.
    os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + str(Path(sys.executable).parent)
    decision = decide(os.environ)
    what = "Python only" if not decision.extension else "C++ and CUDA" if decision.cuda else "C++"
    print(f"unimoe: building {what}: {decision.reason}", flush=True)
    if not decision.extension:
        setup()
        return
    os.environ.setdefault("CXX", find_cxx(os.environ))
    setup(
        ext_modules=[extension(decision.cuda)],
        cmdclass={"build_ext": build_extension_command()},
    )


if __name__ == "__main__":
    main()
