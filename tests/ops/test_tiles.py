"""Tiles: they fit every GPU, do not depend on the token count, and follow the table."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels._triton import tiles
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
        buffers = (tile.num_stages + 1) // 2 if kind == "weights" else tile.num_stages
        assert buffers * tiles.stage_bytes(case, tile) <= device.shared_bytes, (case, tile)


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


def test_shipped_table_is_well_formed():
    table = json.loads(tiles.TABLE.read_text(encoding="utf-8"))
    assert "measured" in table["note"]
    assert len(tiles._measured()) == len(table["entries"])


def test_measured_tile_is_taken(tmp_path, monkeypatch):
    case, device, other = problem(), DEVICES[2], DEVICES[0]
    described = case._asdict() | {"dtype": "bfloat16"}
    measured = Tile(64, 64, 64, 4, 4, 2)
    entry = {"capability": 90, "problem": described, "tile": measured._asdict()}
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({"note": "", "entries": [entry]}), encoding="utf-8")
    monkeypatch.setattr(tiles, "TABLE", table)
    for function in (tiles._measured, tiles.choose):
        function.cache_clear()
    try:
        assert tiles.choose(case, device) == measured
        assert tiles.choose(case, other) == tiles.analytic(case, other)
        nearby = case._replace(rows=512)
        assert tiles.choose(nearby, device) == tiles.analytic(nearby, device)
    finally:
        for function in (tiles._measured, tiles.choose):
            function.cache_clear()


def test_interpreter_takes_small_tiles():
    assert tiles.choose(problem(), STAND_IN) == Tile(*tiles.INTERPRETED)
