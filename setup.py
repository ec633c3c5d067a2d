"""Builds the extension `unimoe_kernels._C` and, on Linux, the allocator `_caching_allocator`.

Everything else is in pyproject.toml.

Environment:
    UNIMOE_SKIP_EXT=1     pure-Python install; torch is not imported.
    UNIMOE_CUDA=1 | 0     require or disable the CUDA sources (default: if torch and nvcc allow).
    TORCH_CUDA_ARCH_LIST  architectures to compile for, such as "8.0+PTX;9.0a".
    UNIMOE_SANITIZE=1     with AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
    CXX, MAX_JOBS         C++ compiler; number of files to compile in parallel.
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
# The oldest torch whose stable ABI the binary may use; passed to both compilers.
TORCH_TARGET_VERSION = "0x020b000000000000"
MINIMUM_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "9.0a", "10.0", "12.0")
# Capabilities with specific instructions (wgmma), and the architecture to compile for. Such code
# runs on every device of this capability, and its PTX on no other.
OWN_ARCHS = {"9.0": "9.0a"}
# No contraction: multiplications and additions are rounded as in the plain torch reference.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]
# Undefined behaviour aborts the process.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo", "--fmad=false"]
# Commands that compile nothing. An sdist lists csrc in MANIFEST.in, so it does not require torch.
COMMANDS_WITHOUT_EXTENSION = {"egg_info", "sdist", "clean"}


class Decision(NamedTuple):
    """Which parts to build, and the reason."""

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
    """Returns nvcc's (major, minor), or None if nvcc cannot be run."""
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
    """Decides whether to build the CUDA sources.

    The decision does not depend on a visible GPU: wheels are built on machines without one.

    Args:
        switch: value of UNIMOE_CUDA: "", "0" or "1".
        torch_cuda: `torch.version.cuda`, None for a CPU build of torch.
        cuda_home: folder of the CUDA toolkit, or None.
        nvcc: (major, minor) of its nvcc, or None.

    Returns:
        (build, reason). Exits if UNIMOE_CUDA=1 cannot be satisfied.
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
    """Decides what to build from the environment and, unless skipped, from torch."""
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
            f"unimoe: the extension is compiled against the installed torch, which cannot be "
            f"imported here ({error}): install torch, then `pip install --no-build-isolation .` "
            f"(or UNIMOE_SKIP_EXT=1 for a pure-Python install)"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        sys.exit(f"unimoe: torch ({torch.__version__}) must be at least 2.11")
    return torch


def choose_archs(visible, supported):
    """Returns a TORCH_CUDA_ARCH_LIST: that of visible devices, else the defaults nvcc supports.

    Args:
        visible: capabilities of the devices, such as ["9.0"]; empty on a machine without GPUs.
        supported: capabilities that `nvcc --list-gpu-arch` lists, such as ["8.0", "9.0"].
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

    # Paths are relative to the root: setuptools rejects absolute ones in an sdist's file list.
    sanitize = SANITIZE_FLAGS if read_switch(os.environ, "UNIMOE_SANITIZE") == "1" else []
    sources = [ROOT / "csrc" / "library.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    archs = ""
    if with_cuda:
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        defines.append("-DUSE_CUDA")  # enables the C shim for the current stream
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(torch, CUDA_HOME))
    # Flags for nvcc must not contain "arch": torch would then drop every -gencode.
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


def caching_allocator():
    """The library of the caching allocator, which is not in torch's stable ABI.

    It is optional: a torch with another c10::Allocator must not stop the build.
    """
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "unimoe_kernels._caching_allocator",
        ["csrc/caching_allocator.cpp"],
        extra_compile_args={"cxx": CXX_FLAGS},
        optional=True,
    )


def pybind11_include():
    """Returns the include folder of pybind11; without the package, torch's copy is used."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def build_extension_command():
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class BuildAll(BuildExtension.with_options(use_ninja=is_ninja_available())):
        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except (RuntimeError, OSError) as error:
                if not extension.optional:
                    raise
                print(f"unimoe: built without {extension.name}: {error}", flush=True)

    return BuildAll


def main():
    if COMMANDS_WITHOUT_EXTENSION & set(sys.argv):
        setup()
        return
    # The ninja of a virtual environment that is not activated is here.
    os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + str(Path(sys.executable).parent)
    decision = decide(os.environ)
    what = "Python only" if not decision.extension else "C++ and CUDA" if decision.cuda else "C++"
    print(f"unimoe: building {what}: {decision.reason}", flush=True)
    if not decision.extension:
        setup()
        return
    os.environ.setdefault("CXX", find_cxx(os.environ))
    extensions = [extension(decision.cuda)]
    if sys.platform == "linux":
        extensions.append(caching_allocator())
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": build_extension_command()},
    )


if __name__ == "__main__":
    main()
