"""What setup.py decides to build, and what it says when it cannot."""

import os
import subprocess
import sys

import pytest
import torch

TOOLKIT = "/opt/toolkit"


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "home", "nvcc", "expected"),
    [
        ("", "13.0", TOOLKIT, (13, 0), True),
        ("", "13.0", TOOLKIT, (13, 2), True),
        ("1", "13.0", TOOLKIT, (13, 0), True),
        ("0", "13.0", TOOLKIT, (13, 0), False),
        ("", None, None, None, False),
        ("", "13.0", None, None, False),
        ("", "13.0", TOOLKIT, None, False),
        ("", "12.8", TOOLKIT, (13, 0), False),
    ],
)
def test_cuda_needs_torch_with_cuda_and_its_nvcc(
    build_script, switch, torch_cuda, home, nvcc, expected
):
    build, reason = build_script.decide_cuda(switch, torch_cuda, home, nvcc)
    assert build is expected
    assert reason


@pytest.mark.parametrize(
    ("torch_cuda", "home", "nvcc", "reason"),
    [
        (None, None, None, "built without CUDA"),
        ("13.0", None, None, "set CUDA_HOME"),
        ("13.0", TOOLKIT, None, "cannot be run"),
        ("12.8", TOOLKIT, (13, 0), "nvcc is 13.0 but torch was built with CUDA 12.8"),
    ],
)
def test_demanded_cuda_that_cannot_be_had_is_an_error(build_script, torch_cuda, home, nvcc, reason):
    with pytest.raises(SystemExit, match=f"UNIMOE_CUDA=1 cannot be met: .*{reason}"):
        build_script.decide_cuda("1", torch_cuda, home, nvcc)


def test_skipping_imports_no_torch(build_script, monkeypatch):
    def fail():
        raise AssertionError("torch was imported")

    monkeypatch.setattr(build_script, "import_torch", fail)
    decision = build_script.decide({"UNIMOE_SKIP_EXT": "1", "PATH": os.environ["PATH"]})
    assert decision == (False, False, "UNIMOE_SKIP_EXT=1")


@pytest.mark.parametrize("environ", [{"PATH": ""}, {"PATH": os.environ["PATH"], "CXX": "no-cxx"}])
def test_no_compiler_gives_a_python_install(build_script, environ):
    decision = build_script.decide(environ)
    assert not decision.extension
    assert "no C++ compiler" in decision.reason


def test_skipping_and_demanding_contradict(build_script):
    environ = {"UNIMOE_SKIP_EXT": "1", "UNIMOE_CUDA": "1"}
    with pytest.raises(SystemExit, match="cannot be met: UNIMOE_SKIP_EXT=1"):
        build_script.decide(environ)


@pytest.mark.parametrize("name", ["UNIMOE_SKIP_EXT", "UNIMOE_CUDA"])
def test_switches_are_zero_or_one(build_script, name):
    with pytest.raises(SystemExit, match=rf"{name} \('yes'\) must be 0, 1 or unset"):
        build_script.decide({name: "yes"})


@pytest.mark.parametrize(
    ("visible", "supported", "expected"),
    [
        ([], ["7.5", "8.0", "9.0", "10.0", "12.0"], "8.0;9.0a;10.0;12.0+PTX"),
        ([], ["8.0", "8.6", "9.0"], "8.0+PTX;9.0a"),
        ([], ["9.0"], "9.0a"),
        (["9.0", "8.0", "9.0"], ["8.0", "9.0"], "8.0;9.0a"),
        (["12.0", "9.0"], ["9.0", "12.0"], "9.0a;12.0"),
    ],
)
def test_architectures(build_script, visible, supported, expected):
    assert build_script.choose_archs(visible, supported) == expected


def test_torch_compiles_for_the_architectures(build_script, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    archs = build_script.choose_archs([], ["8.0", "9.0", "10.0", "12.0"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    flags = _get_cuda_arch_flags()
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags
    assert "-gencode=arch=compute_120,code=compute_120" in flags
    assert not [flag for flag in flags if flag.endswith("code=compute_90a")]


def test_nvcc_flags_leave_the_architectures_to_torch(build_script):
    """Torch drops every -gencode when it sees "arch" in one of our flags."""
    assert not [flag for flag in build_script.NVCC_FLAGS if "arch" in flag]
    assert not [flag for flag in build_script.CXX_FLAGS if "march" in flag]


def run_setup(root, *arguments, **environ):
    """Runs Python with a compiler that is found, whatever this machine has, and never called."""
    environ = {"CXX": sys.executable, "UNIMOE_SKIP_EXT": "", **environ}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_of_a_cpu_torch_stops_the_build(root, build_script):
    result = run_setup(root, "setup.py", "build_ext", "--dry-run", UNIMOE_CUDA="1")
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "unimoe: UNIMOE_CUDA=1 cannot be met: "
        "this torch was built without CUDA (torch.version.cuda is None)"
    )


def test_missing_torch_is_one_line_with_the_remedy(root, build_script):
    code = (
        "import sys, runpy; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', 'bdist_wheel']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run_setup(root, "-c", code, UNIMOE_CUDA="")
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--no-build-isolation" in result.stderr


def test_a_failure_of_an_optional_library_does_not_stop_the_build(
    build_script, monkeypatch, capsys
):
    from setuptools.command.build_ext import build_ext
    from setuptools.dist import Distribution

    def fail(self, extension):
        raise RuntimeError("c10::Allocator has changed")

    monkeypatch.setattr(build_ext, "build_extension", fail)
    command = build_script.build_extension_command()(Distribution())
    command.build_extension(build_script.caching_allocator())
    printed = capsys.readouterr().out
    assert "without unimoe_kernels._caching_allocator: c10::Allocator has changed" in printed
    with pytest.raises(RuntimeError, match="has changed"):
        command.build_extension(build_script.extension(with_cuda=False))
