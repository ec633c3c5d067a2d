"""The command `python -m unimoe_kernels.tune`, as far as it goes without a GPU."""

import io

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels._triton import table
from unimoe_kernels._triton.problem import Tile
from unimoe_kernels.tune.__main__ import Progress, main
from unimoe_kernels.tune.search import Outcome


def test_list_names_every_problem_in_order(capsys, tmp_path):
    output = tmp_path / "tiles.json"
    shape = ["--shape", "2048", "768", "128", "8"]
    assert main([str(output), *shape, "--tokens", "4096", "16", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "gate_up",
        "down",
        "gate_up",
        "down",
        "gated_backward",
        "grad_down",
        "grad_gate_up",
        "grad_x",
    ]
    assert "D=2048 F=768 E=128 K=8 T=4096" in lines[0]
    assert "around it" in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64", "0", "4", "2"], "must be positive"),
        (["--shape", "64", "64", "4", "5"], r"top_k \(5\) must be at most num_experts \(4\)"),
        (["--shape", "64", "64", "4", "2", "--minutes", "0"], "--minutes and --tokens must be"),
        (["--shape", "64", "64", "4", "2", "--tokens", "0"], "--minutes and --tokens must be"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / "tiles.json"), *arguments])


def test_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="requires a CUDA GPU; --list shows"):
        main([str(tmp_path / "tiles.json"), "--shape", "64", "64", "4", "2"])


def test_lines_of_progress():
    stream, own = io.StringIO(), Tile(128, 256, 64, 8, 8, 4, True)
    progress = Progress(3, stream)
    progress.trying("down", 4)
    progress.measured("down", Outcome(own, 1e-3, own._replace(descriptors=False), 0.8e-3))
    progress.measured("gate_up", Outcome(own, 1e-3, own, 1e-3))
    progress.skipped("grad_x", "measured already")
    assert stream.getvalue().splitlines() == [
        "1/3 down: 0.800 ms with 128x256x64/8 8 warps 4 stages pointers,"
        " 25% faster than the analytic 128x256x64/8 8 warps 4 stages descriptors",
        "2/3 gate_up: 1.000 ms with 128x256x64/8 8 warps 4 stages descriptors, the analytic tile",
        "3/3 grad_x: measured already",
    ]


@pytest.mark.gpu
def test_tunes_on_a_gpu(tmp_path):
    output = tmp_path / "tiles.json"
    arguments = [str(output), "--shape", "256", "128", "4", "2", "--tokens", "1024"]
    arguments += ["--passes", "forward"]
    assert main(arguments) == 0
    assert len(table.read(output, "output").tiles) == 2
    before = output.read_text(encoding="utf-8")
    assert main(arguments) == 0
    assert output.read_text(encoding="utf-8") == before
