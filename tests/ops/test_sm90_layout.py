"""Index functions of the kernels for compute capability 9.0, beside plain formulas."""

import ctypes
import itertools
import random
import subprocess

import emulated
import pytest

TILE_ROWS, TILE_COLUMNS, DEPTH = 128, 256, 64
WARPS, LANES = range(4), range(32)

pytestmark = pytest.mark.skipif(emulated.COMPILER == [None], reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The functions of both headers, compiled for the CPU."""
    library = tmp_path_factory.mktemp("sm90") / "layout.so"
    source = emulated.EMULATION / "sm90_layout.cpp"
    command = [*emulated.COMPILER, "-shared", "-fPIC", "-std=c++20", "-Wall", "-Werror"]
    command += [f"-I{emulated.ROOT / 'csrc'}", str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("along", "across", "ragged"):
        getattr(loaded, name).restype = ctypes.c_uint64
    return loaded


def swizzle(address):
    """The hardware's 128-byte swizzle: bits 4-6 of an address are xored with its bits 7-9."""
    return address ^ ((address >> 7 & 7) << 4)


def decoded(descriptor):
    """Address, leading and stride bytes of a descriptor of wgmma, and its kind of swizzle."""
    return (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 16 & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
        descriptor >> 62,
    )


def test_blocks_have_the_swizzle_of_tma(functions):
    for row, vector in itertools.product(range(128), range(8)):
        expected = swizzle(row * 128 + vector * 16)
        assert functions.swizzled_byte(row, vector, 128) == expected


def test_staged_rows_meet_every_bank_once(functions):
    places = {
        (row, vector): functions.swizzled_byte(row, vector, 256)
        for row in range(64)
        for vector in range(16)
    }
    assert sorted(places.values()) == list(range(0, 64 * 256, 16))
    assert all(place // 256 == row for (row, _), place in places.items())
    for top, vector in itertools.product(range(0, 64, 8), range(16)):
        assert len({places[top + row, vector] % 128 for row in range(8)}) == 8


@pytest.mark.parametrize("base", [0, 1024, 3 * 49152 + 16384])
@pytest.mark.parametrize("step", range(4))
def test_operand_along_its_depth_is_read_where_tma_wrote_it(functions, base, step):
    start, _, stride, kind = decoded(functions.along(base, step))
    assert kind == 1
    for row, depth in itertools.product(range(256), range(16)):
        read = swizzle(start + row // 8 * stride + row % 8 * 128 + depth * 2)
        column = step * 16 + depth
        written = base + functions.swizzled_byte(row, column // 8, 128) + column % 8 * 2
        assert read == written


@pytest.mark.parametrize("base", [0, 1024, 3 * 49152 + 16384])
@pytest.mark.parametrize("step", range(4))
def test_operand_across_its_depth_is_read_where_tma_wrote_it(functions, base, step):
    start, leading, stride, kind = decoded(functions.across(base, step))
    assert kind == 1
    for column, depth in itertools.product(range(256), range(16)):
        read = start + column // 64 * leading + depth // 8 * stride + depth % 8 * 128
        read = swizzle(read + column % 64 * 2)
        row = step * 16 + depth
        written = base + column // 64 * 8192 + functions.swizzled_byte(row, column % 64 // 8, 128)
        assert read == written + column % 8 * 2


def test_every_sum_is_in_one_register(functions):
    seen = set()
    for warp, lane, j, half, i in itertools.product(WARPS, LANES, range(32), range(2), range(2)):
        row = functions.row_of_sum(warp, lane, half)
        column = functions.column_of_sum(j, lane, i)
        assert (row, column) == (16 * warp + lane // 4 + 8 * half, 8 * j + 2 * (lane % 4) + i)
        seen.add((row, column))
    assert seen == set(itertools.product(range(64), range(256)))


def test_stored_matrices_are_the_sums(functions):
    """`stmatrix.x4`: lane 8 m + r points to row r of matrix m, of which a lane has two elements."""
    staged = {}
    for warp, j in itertools.product(WARPS, range(0, 16, 2)):
        # The four registers of a lane: columns j, both halves, then columns j + 1.
        for m, (column, half) in enumerate(itertools.product((j, j + 1), range(2))):
            for lane, i in itertools.product(LANES, range(2)):
                points = 8 * m + lane // 4
                byte = functions.swizzled_byte(
                    functions.row_stored(warp, points), functions.vector_stored(j, points), 256
                )
                value = (
                    functions.row_of_sum(warp, lane, half),
                    functions.column_of_sum(column, lane, i),
                )
                staged[byte + lane % 4 * 4 + 2 * i] = value
    for row, column in itertools.product(range(64), range(128)):
        byte = functions.swizzled_byte(row, column // 8, 256) + column % 8 * 2
        assert staged[byte] == (row, column)


def test_parts_of_shared_memory_do_not_overlap(functions):
    values = (ctypes.c_int * 6)()
    functions.constants(values)
    used, largest, stages, staging, barriers, table = values
    assert stages == 4 * (128 + 256) * 64 * 2
    assert stages <= staging
    assert staging + 2 * 64 * 128 * 2 <= barriers
    assert barriers + 2 * 4 * 8 <= table
    assert table + 513 * 4 <= used <= largest == 232448
    assert staging % 1024 == 0
    assert barriers % 8 == 0


def ints(values):
    return (ctypes.c_int * len(values))(*values)


def sizes_of(kind, experts, rng):
    """Rows of each expert, ragged, with empty experts or all of them on one."""
    if kind == "empty":
        return [0] * experts
    if kind == "one":
        return [1000 if e == experts // 2 else 0 for e in range(experts)]
    if kind == "full":
        return [TILE_ROWS * rng.randint(1, 3) for _ in range(experts)]
    if kind == "skewed":
        return [3000 // (e + 1) ** 2 for e in range(experts)]
    return [rng.choice([0, 1, 127, 128, 129, rng.randint(0, 700)]) for _ in range(experts)]


@pytest.mark.parametrize("kind", ["ragged", "empty", "one", "full", "skewed"])
@pytest.mark.parametrize("experts", [1, 2, 7, 64, 512])
@pytest.mark.parametrize(("width", "columns"), [(8, 256), (256, 256), (1000, 128), (4104, 256)])
def test_every_row_tile_is_visited_once(functions, kind, experts, width, columns):
    rng = random.Random(experts)
    sizes = sizes_of(kind, experts, rng)
    offsets = [0, *itertools.accumulate(sizes)]
    tiles = [-(-size // TILE_ROWS) for size in sizes]
    assert tiles == [functions.count_tiles(size, TILE_ROWS) for size in sizes]
    before = [0, *itertools.accumulate(tiles)]
    column_tiles = -(-width // columns)
    expected = {
        (e, offsets[e] + tile * TILE_ROWS, offsets[e + 1], column * columns)
        for e in range(experts)
        for tile in range(tiles[e])
        for column in range(column_tiles)
    }
    out = (ctypes.c_int * (4 * before[-1] * column_tiles + 1))()
    arguments = (ints(offsets), ints(before), experts, column_tiles, columns, out)
    count = functions.rows_tiles(*arguments)
    visited = [tuple(out[4 * t : 4 * t + 4]) for t in range(count)]
    assert len(visited) == len(expected)
    assert set(visited) == expected
    # What the host launches for without knowing the sizes is enough.
    rows = offsets[-1]
    assert before[-1] <= rows // TILE_ROWS + min(rows, experts)


@pytest.mark.parametrize(("experts", "rows", "columns"), [(1, 1, 1), (3, 9, 5), (7, 16, 2)])
def test_every_tile_of_a_weight_is_visited_once(functions, experts, rows, columns):
    out = (ctypes.c_int * (3 * experts * rows * columns))()
    functions.weight_tiles(experts, rows, columns, out)
    visited = [tuple(out[t : t + 3]) for t in range(0, len(out), 3)]
    expected = itertools.product(
        range(experts),
        range(0, rows * TILE_ROWS, TILE_ROWS),
        range(0, columns * TILE_COLUMNS, TILE_COLUMNS),
    )
    assert sorted(visited) == list(expected)


@pytest.mark.parametrize("row_bytes", [16, 4096, 28672])
@pytest.mark.parametrize(("begin", "size"), [(0, 1), (5, 64), (1000, 700), (2**31 - 200, 198)])
def test_ragged_places_are_the_rows_of_an_expert(functions, row_bytes, begin, size):
    sizes = (2**30, 0x7FFFFFFF, 0x7FFFFFFF)
    for k in range(0, size, DEPTH):
        out = (ctypes.c_int * 3)()
        byte = functions.ragged(k, begin, size, ctypes.c_uint64(row_bytes), out)
        assert byte == (begin + k) * row_bytes
        # Rows from the size on are outside of the tensor, for which TMA gives zeros.
        for row in (k, min(k + DEPTH, size) - 1, size, k + DEPTH):
            assert (out[0] + row - k < sizes[0]) == (row < size)
        assert all(place < limit for place, limit in zip(out, sizes, strict=True))
