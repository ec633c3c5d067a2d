import os
import shlex

import pytest
import torch

import unimoe_kernels

from .providers import PROVIDERS
from .shapes import SETS

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("unimoe benchmarks")
    group.addoption(
        "--shapes",
        metavar="SET[:TEXT]",
        help=f"one of {', '.join(SETS)} (default: full on a GPU, small on a CPU), and optionally "
        "a text that the name of a case must hold, such as small:mixtral",
    )
    group.addoption(
        "--smoke", action="store_true", help="the smallest shapes, checked and not timed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RESULTS] = []
    if config.getoption("smoke"):
        # pytest-benchmark reads its option when it is configured, after this.
        config.option.benchmark_disable = True
        config.option.shapes = "smoke"
    if not any("--benchmark-columns" in str(arg) for arg in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = _cases(metafunc.config)
        metafunc.parametrize("case", [pytest.param(case, id=str(case)) for case in cases])


def _cases(config):
    chosen = config.getoption("shapes")
    default = "full" if _device().type == "cuda" else "small"
    name, _, text = (chosen or default).partition(":")
    if name not in SETS:
        raise pytest.UsageError(f"--shapes ({name}) must be one of {', '.join(SETS)}")
    cases = [case for case in SETS[name] if text in str(case)]
    if not cases:
        raise pytest.UsageError(f"--shapes ({chosen}): no case of {name} holds {text!r}")
    return cases


def _device():
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("UNIMOE_BENCH_DEVICE", default))


@pytest.fixture(scope="session")
def device():
    return _device()


@pytest.fixture(scope="session")
def dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def results(pytestconfig):
    return pytestconfig.stash[RESULTS]


def pytest_benchmark_update_machine_info(config, machine_info):
    # The name of the host says nothing about a result.
    machine_info.pop("node", None)
    machine_info.get("cpu", {}).pop("flags", None)
    device = _device()
    if device.type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name(device)
        machine_info["cuda"] = torch.version.cuda
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["backends"] = {
        op: unimoe_kernels.available_backends(op, device)[0]
        for op in ("topk_router", "expert_sort", "permute", "grouped_mm", "moe_mlp", "unpermute")
    }
    try:
        import transformers
    except ImportError:
        pass
    else:
        machine_info["transformers"] = transformers.__version__
    machine_info["command"] = shlex.join(["pytest", *map(str, config.invocation_params.args)])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[RESULTS]
    if not rows:
        return
    terminalreporter.section("median ms, and ratio to dense in the same run")
    width = max(len(_name(row)) for row in rows)
    columns = {name: max(len(name), 16) for name in PROVIDERS}
    header = "  ".join(f"{name:>{size}}" for name, size in columns.items())
    terminalreporter.write_line(f"{'case':{width}}  {header}")
    for row in rows:
        cells = []
        for name, size in columns.items():
            text = "-"
            if name in row["median_ms"]:
                text = f"{row['median_ms'][name]:.3f} ({row['ratio_to_dense'][name]:.2f}x)"
            cells.append(f"{text:>{size}}")
        terminalreporter.write_line(f"{_name(row):{width}}  {'  '.join(cells)}")
    for name, reason in {k: v for row in rows for k, v in row["unavailable"].items()}.items():
        terminalreporter.write_line(f"{name} did not run: {reason}")


def _name(row):
    return "{layer}-T{tokens}-{mode}-{routing}".format(**row["case"])
