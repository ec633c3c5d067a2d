"""Tiles: they fit every GPU, do not depend on the token count, and follow the table."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels._triton import table, tiles
from unimoe_kernels._triton.launch import STAND_IN, Device
from unimoe_kernels._triton.tiles import Problem, Tile

DEVICES = [
    Device(80, 108, 163 * 1024),
    Device(89, 128, 99 * 1024),
    Device(90, 132, 227 * 1024),
    Device(100, 148, 227 * 1024),
    Device(120, 170, 99 * 1024),
]
KINDS = ("rows", "gated", "gated_backward", "weights")
RANKS = {"low_rank": 64, "low_rank_weights": 128}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def problem(kind="rows", inner=2048, width=768, rows=256, dtype=torch.bfloat16, tf32=False):
    height = RANKS.get(kind, 1024 if kind == "weights" else 0)
    inner = 0 if kind == "weights" else inner
    return Problem(kind, inner, width, height, 128, 8, dtype, rows, tf32)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.capability}")
@pytest.mark.parametrize("kind", [*KINDS, *RANKS])
def test_tiles_fit_the_device(device, kind):
    sizes = (1, 8, 24, 100, 128, 768, 14336)
    types = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]
    for width, inner, rows, of in itertools.product(sizes, sizes, (1, 32, 64, 4096), types):
        case = problem(kind, inner, width, rows, *of)
        tile = tiles.choose(case, device)
        for size in tile[:3]:
            assert size >= 16, (case, tile)
            assert size & (size - 1) == 0, (case, tile)
        assert 1 <= tile.num_stages <= 2 * tiles.MAX_STAGES - 1, (case, tile)
        assert tile.num_warps in (4, 8), (case, tile)
        held = tiles.buffers(case, tile, device) * tiles.stage_bytes(case, tile)
        assert held <= device.shared_bytes, (case, tile)


def test_something_is_loaded_while_something_is_multiplied():
    for device, kind in itertools.product(DEVICES, KINDS):
        case = problem(kind)
        tile = tiles.choose(case, device)
        assert tiles.buffers(case, tile, device) >= 2, (device, tile)


def test_few_rows_take_low_tiles():
    device = DEVICES[2]
    heights = [tiles.choose(problem(rows=rows), device).block_m for rows in (1, 16, 32, 64, 2048)]
    assert heights == [16, 16, 32, 64, 128]


def test_rows_fall_into_few_buckets():
    assert tiles.rows_bucket(0, 8) == 1
    assert tiles.rows_bucket(9, 8) == 2
    assert tiles.rows_bucket(8 * 256, 8) == 256
    assert tiles.rows_bucket(8 * 257, 8) == 512
    assert len({tiles.rows_bucket(rows, 8) for rows in range(0, 200_000, 7)}) <= 13


def test_grid_is_bounded_by_tiles_and_processors():
    for device in DEVICES:
        tile = tiles.choose(problem(), device)
        assert tiles.num_programs(problem(), tile, 5, device) == 5
        programs = tiles.num_programs(problem(), tile, 10**6, device)
        assert programs in range(device.processors, 4 * device.processors + 1)


@pytest.fixture
def with_table(tmp_path, monkeypatch):
    """A function that lets the user's table be this one."""

    def clear():
        for function in (tiles._table, tiles.choose):
            function.cache_clear()

    def use(**content):
        path = tmp_path / "own.json"
        path.write_text(json.dumps({"entries": []} | content), encoding="utf-8")
        monkeypatch.setenv(table.VARIABLE, str(path))
        clear()
        return path

    yield use
    clear()


def entry(problem, tile=None, capability=90):
    dtype = str(problem.dtype).removeprefix("torch.")
    record = {"capability": capability, "problem": problem._asdict() | {"dtype": dtype}}
    return record if tile is None else record | {"tile": tile._asdict()}


def test_shipped_table_is_well_formed():
    content = json.loads(table.SHIPPED.read_text(encoding="utf-8"))
    assert "measured" in content["note"]
    tiles_of_problems = table.read(table.SHIPPED, "shipped").tiles
    assert len(tiles_of_problems) == len(content["entries"]) + len(content["unchanged"]) > 0
    # Nothing asks for a weight gradient that gathers any more.
    assert all(one.top_k == 1 for _, one in tiles_of_problems if one.kind == "weights")


def test_measured_problems_take_the_measured_tile():
    content = json.loads(table.SHIPPED.read_text(encoding="utf-8"))
    for record in content["entries"]:
        one = table.parse_problem("problem", record["problem"])
        assert tiles.choose(one, DEVICES[2]) == table.parse_tile("tile", record["tile"])


def test_what_was_measured_taught_the_choice():
    """The analytic tile of Hopper's gated backward is the measured one or next to it."""
    content = json.loads(table.SHIPPED.read_text(encoding="utf-8"))
    records = [r for r in content["entries"] if r["problem"]["kind"] == "gated_backward"]
    assert len(records) == 8
    for record in records:
        one = table.parse_problem("problem", record["problem"])
        tile = table.parse_tile("tile", record["tile"])
        own = tiles.analytic(one, DEVICES[2])
        assert (own.block_m, own.block_n, own.descriptors) == (
            tile.block_m,
            tile.block_n,
            tile.descriptors,
        ), record


def test_measured_tile_is_taken(with_table):
    case, device, other = problem(), DEVICES[2], DEVICES[0]
    measured = Tile(64, 64, 64, 4, 4, 2)
    with_table(entries=[entry(case, measured)])
    assert tiles.choose(case, device) == measured
    assert tiles.choose(case, other) == tiles.analytic(case, other)
    assert tiles.choose(case._replace(width=512), device) == tiles.analytic(case, device)


def test_own_table_lies_on_top_of_the_shipped_one(with_table, tmp_path, monkeypatch):
    case, second = problem(), problem(width=512)
    shipped, own = Tile(64, 64, 64, 4, 4, 2), Tile(64, 128, 64, 4, 4, 2)
    path = tmp_path / "shipped.json"
    path.write_text(json.dumps({"entries": [entry(case, shipped), entry(second, shipped)]}))
    monkeypatch.setattr(table, "SHIPPED", path)
    with_table(entries=[entry(case, own)])
    assert tiles.choose(case, DEVICES[2]) == own
    assert tiles.choose(second, DEVICES[2]) == shipped


def test_number_of_rows_between_measured_ones(with_table):
    device = DEVICES[2]
    short, tall = Tile(64, 256, 64, 8, 8, 4), Tile(256, 128, 64, 8, 8, 4)
    with_table(
        entries=[
            entry(problem(rows=16), Tile(16, 128, 64, 8, 4, 4)),
            entry(problem(rows=512), short),
            entry(problem(rows=4096), tall),
        ],
        unchanged=[entry(problem(rows=1024))],
    )

    def chosen(rows):
        return tiles.choose(problem(rows=rows), device)

    analytic = tiles.analytic(problem(rows=512), device)
    assert chosen(512) == chosen(256) == chosen(128) == short
    assert chosen(1024) == analytic
    assert chosen(2048) == analytic, "as near to 1024 as to 4096: fewer rows decide"
    assert chosen(4096) == tall
    # Where arithmetic sees a difference it is better than a far measurement.
    for rows in (32, 64):
        assert chosen(rows) == tiles.analytic(problem(rows=rows), device)
    assert chosen(8).block_m == chosen(1).block_m == 16
    assert chosen(8) == Tile(16, 128, 64, 8, 4, 4)


def test_tall_tile_is_not_taken_for_few_rows(with_table):
    tall = Tile(256, 128, 64, 8, 8, 4)
    with_table(entries=[entry(problem(rows=4096), tall)])
    assert tiles.choose(problem(rows=256), DEVICES[2]) == tall
    analytic = tiles.analytic(problem(rows=128), DEVICES[2])
    assert tiles.choose(problem(rows=128), DEVICES[2]) == analytic


def test_sixteen_bit_types_share_tiles(with_table):
    tile = Tile(64, 64, 64, 4, 4, 2)
    with_table(entries=[entry(problem(dtype=torch.bfloat16), tile)])
    assert tiles.choose(problem(dtype=torch.float16), DEVICES[2]) == tile
    assert tiles.choose(problem(dtype=torch.float32), DEVICES[2]) != tile


def test_descriptors_are_for_large_tiles_of_new_gpus(with_table):
    with_table()

    def asked(device, **of):
        return tiles.choose(problem(**of), device).descriptors

    assert [asked(device) for device in DEVICES] == [False, False, True, True, False]
    for kind in KINDS:
        assert asked(DEVICES[2], kind=kind)
    assert not asked(DEVICES[2], rows=16)
    assert not asked(DEVICES[2], width=100)
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        assert not asked(DEVICES[2], dtype=dtype, tf32=tf32)


def test_table_switches_descriptors_off(with_table):
    tile = Tile(64, 64, 64, 4, 4, 2, True)
    with_table(entries=[entry(problem(), tile)])
    assert tiles.choose(problem(), DEVICES[2]).descriptors
    with_table(entries=[entry(problem(), tile)], descriptors=False)
    assert tiles.choose(problem(), DEVICES[2]) == tile._replace(descriptors=False)
    assert not tiles.choose(problem(rows=4096), DEVICES[2]).descriptors
    one = problem()
    with_table(entries=[entry(one, tiles.analytic(one, DEVICES[2])._replace(descriptors=False))])
    assert not tiles.choose(one, DEVICES[2]).descriptors


def test_interpreter_takes_small_tiles():
    assert tiles.choose(problem(), STAND_IN) == Tile(*tiles.INTERPRETED)
