"""The compiled extension, and life without it."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from unimoe_kernels import _extension

needs_extension = pytest.mark.skipif(
    not _extension.loaded, reason=f"the extension is not loaded: {_extension.error}"
)

# Puts a finder in front that hides `_C`, or one that finds a binary which does not load.
HIDDEN = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.endswith("._C") else find_spec(name, *a)
"""
BROKEN = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import spec_from_loader
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "unimoe_kernels._C":
            return spec_from_loader(name, ExtensionFileLoader(name, {path!r}))
sys.meta_path.insert(0, Finder)
"""
USE = """
import torch, unimoe_kernels
from unimoe_kernels import _extension
moe = unimoe_kernels.MoE(8, 16, num_experts=4, top_k=2)
y = moe(torch.randn(5, 8)); y.sum().backward()
assert y.shape == (5, 8) and y.abs().sum() > 0
print(_extension.loaded, "|", _extension.error, "|", _extension.build_info())
print(unimoe_kernels.available_backends("permute", "cpu")[0])
"""

COMPARE = """
import torch, unimoe_kernels as u
x, ids = torch.randn(7, 33), torch.randint(0, 6, (7, 3), dtype=torch.int32)
results = []
for name in ("cpp", "reference"):
    with u.use_backend(name):
        leaf, scores = x.clone().requires_grad_(), torch.full((7, 3), 0.5, requires_grad=True)
        order = u.expert_sort(ids, 4)
        rows = u.permute(leaf, order, 3)
        y = u.unpermute(rows, order, 3, scores)
        y.square().sum().backward()
        results.append([*order, rows, y, leaf.grad, scores.grad])
for a, b in zip(*results):
    torch.testing.assert_close(a, b)
assert y.abs().sum() > 0
"""


def run(root, *arguments):
    result = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_package_works_without_the_extension(root):
    state, backend = run(root, "-c", HIDDEN + USE).splitlines()
    assert state == "False | not compiled (pure-Python install) | {}"
    assert backend == "reference"


def test_broken_binary_is_reported(root, tmp_path):
    binary = tmp_path / "_C.so"
    binary.write_bytes(b"not a shared library")
    state, backend = run(
        root, "-c", BROKEN.replace("{path!r}", repr(str(binary))) + USE
    ).splitlines()
    assert state.startswith("False | compiled, but cannot be loaded: ")
    assert "invalid ELF header" in state or "too short" in state
    assert backend == "reference"


@needs_extension
def test_build_info(build_script):
    info = _extension.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["flags"] == " ".join(build_script.CXX_FLAGS)
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert (info["cuda"] is None) == (info["cuda_archs"] is None)
    assert _extension.has_cuda() == (info["cuda"] is not None)
    assert info["unpacked_rows"] > 0
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    names = {
        "avx512bf16": "avx512_bf16",
        "avx512vnni": "avx512_vnni",
        "amx-tile": "amx_tile",
        "amx-bf16": "amx_bf16",
    }
    for feature in info["cpu_features"]:
        assert names.get(feature, feature) in flags


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_binary_needs_only_the_c_interface_of_torch():
    """A mangled symbol of torch would tie the binary to one release of it."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", _extension._module.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split()[-1] for line in output.splitlines()]
    assert "aoti_torch_empty_strided" in symbols
    mangled = [name for name in symbols if re.match(r"_ZN?K?\d*(2at|3c10|5torch|6caffe2)", name)]
    assert not mangled


@needs_extension
@pytest.mark.parametrize("op", ["expert_sort", "permute", "unpermute", "unpermute_backward"])
def test_native_operators_are_registered(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unimoe::{op}", "CPU")


@needs_extension
def test_native_operators_write_every_element(root):
    """Fresh memory holds large numbers here, which a forgotten element would keep."""
    result = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=root,
        env={"MALLOC_PERTURB_": "128", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_info_names_a_backend_for_every_operator(root):
    output = run(root, "-m", "unimoe_kernels.info")
    operators = {"expert_sort", "permute", "unpermute", "grouped_mm", "swiglu", "topk_router"}
    operators |= {"moe_mlp", "grouped_lora"}
    rows = [line.split(maxsplit=3) for line in output.splitlines()]
    table = {row[0]: row for row in rows if len(row) == 4 and row[1] == "cpu"}
    assert operators <= set(table)
    assert {row[2] for row in table.values()} <= {"cpp", "reference"}
    assert all(row[3] for row in table.values())
