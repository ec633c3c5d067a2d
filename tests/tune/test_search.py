"""The search for tiles with a timer that is made up: what it finds, keeps, skips and survives."""

import json

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels._triton import table, tiles
from unimoe_kernels._triton.launch import Device, interpreted
from unimoe_kernels.tune.candidates import neighbours
from unimoe_kernels.tune.cases import Shape, cases_of
from unimoe_kernels.tune.matmuls import Expert, build
from unimoe_kernels.tune.record import Record
from unimoe_kernels.tune.search import DeviceLostError, compiling_only, tune

DEVICE = Device(90, 132, 227 * 1024)
MACHINE = {"gpu": "NVIDIA H100"}
CASES = cases_of([Shape(4096, 11008, 4, 2)], [4096], torch.bfloat16, ["forward"])
SHAPE = {"block_m": 128, "block_n": 128, "block_k": 64}
OWN = tiles.analytic(CASES[0].problem, DEVICE)


class FakeMatmul:
    """Returns what is right, except with the tiles that `broken` gives an outcome for."""

    def __init__(self, case, broken=None):
        self.broken = {} if broken is None else broken
        self.launched = []
        self.right = torch.arange(1.0, 9).view(4, 2)

    def launch(self, tile):
        self.launched.append(tile)
        outcome = self.broken.get(tile)
        if isinstance(outcome, Exception):
            raise outcome
        return (self.right if outcome is None else outcome,)

    def some_experts(self):
        return [Expert(0, 0, 2, None), Expert(1, 2, 4, None)]

    def part(self, outputs, own):
        return (outputs[0][own.begin : own.end],)

    def exact(self, own):
        return self.part((self.right,), own)


class Bench:
    """Runs `tune` on made-up speeds, seconds by tile."""

    def __init__(self, path, seconds, broken=None, cases=CASES):
        self.path, self.seconds, self.broken, self.cases = path, seconds, broken, cases
        self.matmuls, self.lines, self.now = [], [], 0.0
        self.matmul = FakeMatmul

    def build(self, case):
        self.matmuls.append(self.matmul(case, self.broken))
        return self.matmuls[-1]

    def timer(self, functions):
        taken = []
        for function in functions:
            function()
            taken.append(self.seconds(self.matmuls[-1].launched[-1]))
        self.now += 1
        return taken

    def run(self, limit=1e9):
        record = Record(self.path, DEVICE.capability, MACHINE)
        self.finish = tune(
            self.cases,
            DEVICE,
            self.build,
            self.timer,
            record,
            lambda: self.now,
            limit,
            self,
        )
        return self.finish.complete

    def measured(self, case, outcome):
        self.lines.append((case.name, outcome))

    def trying(self, case, number):
        pass

    def skipped(self, case, reason):
        self.lines.append((case.name, reason))


def prefers(**wanted):
    """Every field of the tile that is as wanted makes it a tenth faster."""

    def seconds(tile):
        return 1e-3 * 0.9 ** sum(getattr(tile, field) == value for field, value in wanted.items())

    return seconds


def content(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sub" / "tiles.json"


def test_fastest_tile_is_found_step_by_step_and_used(path, monkeypatch):
    bench = Bench(path, prefers(**SHAPE, group_m=4, descriptors=False, num_stages=3))
    assert bench.run()
    best = OWN._replace(group_m=4, descriptors=False, num_stages=3)
    assert best not in neighbours(CASES[0].problem, OWN, DEVICE), "more than one step away"
    assert bench.lines[0][1].tile == best
    first = content(path)["entries"][0]
    assert first["tile"] == best._asdict()
    assert first["seconds"] == pytest.approx(1e-3 * 0.9**6)
    assert first["analytic_seconds"] == pytest.approx(1e-3 * 0.9**3)
    monkeypatch.setenv(table.VARIABLE, str(path))
    for function in (tiles._table, tiles.choose):
        function.cache_clear()
    try:
        for case, (_, outcome) in zip(CASES, bench.lines, strict=True):
            assert tiles.choose(case.problem, DEVICE) == outcome.tile
    finally:
        for function in (tiles._table, tiles.choose):
            function.cache_clear()


@pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")
def test_real_matmuls_in_the_interpreter(path):
    bench = Bench(path, prefers(), cases=cases_of([Shape(48, 32, 4, 2)], [24], torch.bfloat16))
    assert [case.name for case in bench.cases] == ["gate_up", "down"]

    class Watched:
        def __init__(self, matmul):
            self.matmul, self.launched = matmul, []

        def launch(self, tile):
            self.launched.append(tile)
            return self.matmul.launch(tile)

        def __getattr__(self, name):
            return getattr(self.matmul, name)

    bench.matmul = lambda case, broken: Watched(build(case, torch.device("cpu")))
    # Each launch would be interpreted again for nothing.
    bench.timer = lambda functions: [1e-3] * len(functions)
    assert bench.run()
    assert content(path)["failed"] == []
    for matmul in bench.matmuls:
        assert {tile.descriptors for tile in matmul.launched} == {False, True}
        assert len(matmul.launched) == len(set(matmul.launched)) > 4


def test_small_gains_keep_the_analytic_tile(path):
    bench = Bench(path, lambda tile: 1e-3 if tile == OWN else 0.985e-3, cases=CASES[:1])
    assert bench.run()
    assert bench.lines[0][1].tile == OWN
    assert content(path)["entries"] == []
    assert [record["problem"]["kind"] for record in content(path)["unchanged"]] == ["gated"]


def test_second_run_measures_nothing_again(path):
    Bench(path, prefers(group_m=4)).run()
    before = path.read_text(encoding="utf-8")
    again = Bench(path, prefers(group_m=16))
    assert again.run()
    assert again.matmuls == []
    assert again.lines == [(case.name, "measured already") for case in CASES]
    assert path.read_text(encoding="utf-8") == before


def test_another_analytic_tile_is_measured_again(path):
    Bench(path, prefers(group_m=4), cases=CASES[:1]).run()
    changed = content(path)
    changed["entries"][0]["analytic"]["num_stages"] = 1
    path.write_text(json.dumps(changed), encoding="utf-8")
    Bench(path, prefers(group_m=16), cases=CASES[:1]).run()
    assert [record["tile"]["group_m"] for record in content(path)["entries"]] == [16]


def test_time_is_over_between_problems(path):
    bench = Bench(path, prefers(group_m=4))
    assert not bench.run(limit=1)
    assert len(bench.lines) == 1, "the first problem is brought to an end"
    rest = Bench(path, prefers(group_m=4))
    assert rest.run()
    assert rest.lines[0][1] == "measured already"
    assert len(content(path)["entries"]) == 2


def test_wrong_numbers_and_errors_are_never_chosen(path):
    around = neighbours(CASES[0].problem, OWN, DEVICE)
    wrong, nan, raising = around[:3]
    right = FakeMatmul(None).right
    broken = {
        wrong: right * torch.tensor([[1.0, 1.0], [1, 1], [1, 1], [1, 1.1]]),
        nan: right * float("nan"),
        raising: ValueError("out of resource: shared memory\nand more"),
    }
    bench = Bench(path, lambda tile: 1e-6 if tile in broken else 1e-3, broken, CASES[:1])
    assert bench.run()
    assert bench.lines[0][1].tile == OWN
    errors = {tuple(record["tile"].values()): record["error"] for record in content(path)["failed"]}
    assert errors[tuple(wrong)].startswith("wrong numbers: relative error")
    assert errors[tuple(nan)].startswith("wrong numbers: relative error")
    assert errors[tuple(raising)] == "ValueError: out of resource: shared memory"


def test_rows_that_no_expert_compares_are_compared_with_the_first_tile(path):
    class Partial(FakeMatmul):
        def some_experts(self):
            return [Expert(0, 0, 2, None)]

    wrong = neighbours(CASES[0].problem, OWN, DEVICE)[0]
    outcome = FakeMatmul(None).right.clone()
    outcome[3, 1] = 0
    seconds = lambda tile: 1e-6 if tile == wrong else 1e-3  # noqa: E731
    bench = Bench(path, seconds, {wrong: outcome}, CASES[:1])
    bench.build = lambda case: (
        bench.matmuls.append(Partial(case, bench.broken)) or bench.matmuls[-1]
    )
    assert bench.run()
    assert bench.lines[0][1].tile == OWN
    assert len(content(path)["failed"]) == 1


def test_descriptors_that_do_not_run_leave_pointers(path):
    class Broken(dict):
        def get(self, tile):
            return RuntimeError("descriptor: not supported") if tile.descriptors else None

    bench = Bench(path, prefers(group_m=4), Broken(), CASES[:1])
    assert OWN.descriptors
    assert bench.run()
    outcome = bench.lines[0][1]
    assert outcome.tile == OWN._replace(descriptors=False, group_m=4)
    assert outcome.analytic_seconds is None
    assert table.read(path, "output").tiles == {(90, CASES[0].problem): outcome.tile}


def test_nothing_runs(path):
    class Broken(dict):
        def get(self, tile):
            return RuntimeError("no kernel image")

    bench = Bench(path, prefers(), Broken(), CASES[:1])
    assert bench.run()
    assert bench.lines == [("gate_up", "no tile ran and gave the right numbers")]
    assert bench.finish.broken == CASES[:1]
    assert content(path)["entries"] == content(path)["unchanged"] == []


def test_tile_that_breaks_the_device_is_left_out_next_time(path):
    deadly = neighbours(CASES[0].problem, OWN, DEVICE)[1]
    broken = {deadly: RuntimeError("CUDA error: an illegal memory access was encountered")}
    with pytest.raises(DeviceLostError, match=r"gate_up .* illegal memory access"):
        Bench(path, prefers(group_m=4), broken).run()
    again = Bench(path, prefers(group_m=4), broken)
    assert again.run()
    assert not any(deadly in matmul.launched for matmul in again.matmuls[:1])
    assert again.lines[0][1].tile.group_m == 4


def test_tile_that_never_came_back_is_left_out_next_time(path):
    class Killed(BaseException):
        pass

    deadly = neighbours(CASES[0].problem, OWN, DEVICE)[1]

    class Deadly(FakeMatmul):
        def launch(self, tile):
            if tile == deadly:
                raise Killed
            return super().launch(tile)

    bench = Bench(path, prefers(group_m=4), cases=CASES[:1])
    bench.matmul = Deadly
    with pytest.raises(Killed):
        bench.run()
    assert content(path)["trying"]["tile"] == deadly._asdict()
    assert table.read(path, "output").tiles == {}, "a table all the same"
    again = Bench(path, prefers(group_m=4), cases=CASES[:1])
    assert again.run()
    assert deadly not in again.matmuls[0].launched
    assert "trying" not in content(path)
    assert "ended while this tile was tried" in content(path)["failed"][0]["error"]


def test_inputs_that_do_not_fit_are_skipped(path):
    bench = Bench(path, prefers(group_m=4))
    build = bench.build

    def out_of_memory(case):
        if case.name == "gate_up":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(case)

    bench.build = out_of_memory
    assert bench.run()
    assert "do not fit into the memory" in bench.lines[0][1]
    assert bench.lines[1][1].tile.group_m == 4


def test_file_is_whole_when_a_write_is_cut_short(path, monkeypatch):
    Bench(path, prefers(group_m=4), cases=CASES[:1]).run()
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Bench(path, prefers(group_m=4)).run()
    assert path.read_text(encoding="utf-8") == before


def test_files_that_are_not_continued(path):
    Bench(path, prefers(group_m=4), cases=CASES[:1]).run()
    with pytest.raises(ValueError, match=r"of the same GPU \(NVIDIA B200\) .* NVIDIA H100"):
        Record(path, 100, {"gpu": "NVIDIA B200"})
    path.write_text('{"entries": [1]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"output \(.*\): entries\[0\] must be an object"):
        Record(path, 90, MACHINE)


def test_compiling_only_launches_nothing(monkeypatch):
    from triton.runtime.jit import JITFunction

    calls = []
    original = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: calls.append(options))
    with compiling_only():
        JITFunction.run(None, 1, grid=(1,), warmup=False, BLOCK=2)
    assert calls == [{"grid": (1,), "warmup": True, "BLOCK": 2}]
    monkeypatch.undo()
    assert JITFunction.run is original
