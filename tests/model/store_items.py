"""Items of a feature store: their numbers, and whether a store holds them."""

import zlib

import torch

from unimoe_model.data.feature_store import FeatureStore

SETTINGS = {"encoder": "openai/clip-vit", "fingerprint": "1234", "frames": 8}
SHAPES = [(3, 2, 5), (1, 4), (7,), (), (0, 5)]
LONG_AGO = 10**18


def pieces_of(key, shapes=SHAPES):
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_same_bits(actual, pieces, dtype):
    assert len(actual) == len(pieces)
    for got, piece in zip(actual, pieces, strict=True):
        expected = piece.to(dtype)
        assert got.dtype == torch.float32
        assert got.shape == piece.shape
        assert torch.equal(got, expected.float())
        bits = [x.to(dtype).flatten().view(torch.int16) for x in (got, expected)]
        assert torch.equal(*bits)


def assert_items(store, keys, shapes=SHAPES):
    assert len(store) == len(keys)
    for key in keys:
        assert key in store
        assert_same_bits(store.read(key), pieces_of(key, shapes), store.dtype)


def fill(root, keys, shapes=SHAPES, **options):
    with FeatureStore(root, SETTINGS, **options) as store:
        for key in keys:
            store.write(key, pieces_of(key, shapes))
    return store.folder


def data_files(folder):
    return {path.name: path.stat().st_size for path in sorted(folder.glob("features-*.bin"))}
