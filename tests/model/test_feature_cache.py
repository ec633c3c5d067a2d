import os

import pytest
import torch

from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.media_set import MediaSet


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(4, 3, 5, generator=generator).half(),
        "lengths": torch.tensor([1, 3, 2, 3]),
        "empty": torch.zeros(0, 2),
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)


def not_called() -> dict[str, torch.Tensor]:
    raise AssertionError("features were built again")


def test_builds_once_for_each_fingerprint(tmp_path):
    cache = FeatureCache(tmp_path / "made" / "on demand")
    assert_same(cache.load_or_build("clips", "seed 0", lambda: features(0)), features(0))
    assert_same(cache.load_or_build("clips", "seed 0", not_called), features(0))
    assert_same(cache.load_or_build("clips", "seed 1", lambda: features(1)), features(1))
    assert_same(cache.load_or_build("clips", "seed 0", not_called), features(0))
    assert len(list(cache.root.iterdir())) == 2


def truncated(content: bytes) -> bytes:
    return content[:-7]


def only_start(content: bytes) -> bytes:
    return content[:5]


def emptied(content: bytes) -> bytes:
    return b""


def one_bit_flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


@pytest.mark.parametrize("damage", [truncated, only_start, emptied, one_bit_flipped])
def test_damaged_file_is_reported_and_built_again(tmp_path, capsys, damage):
    cache = FeatureCache(tmp_path)
    cache.load_or_build("clips", "f", features)
    path = cache.path("clips", "f")
    path.write_bytes(damage(path.read_bytes()))
    assert_same(cache.load_or_build("clips", "f", features), features())
    error = capsys.readouterr().err
    assert str(path) in error
    assert "damaged" in error
    assert_same(cache.load_or_build("clips", "f", not_called), features())


def test_file_of_another_fingerprint_is_not_used(tmp_path, capsys):
    cache = FeatureCache(tmp_path)
    cache.load_or_build("clips", "one", lambda: features(1))
    cache.path("clips", "one").rename(cache.path("clips", "two"))
    assert_same(cache.load_or_build("clips", "two", lambda: features(2)), features(2))
    assert "fingerprint" in capsys.readouterr().err


def test_failed_build_leaves_no_file(tmp_path):
    cache = FeatureCache(tmp_path)
    with pytest.raises(AssertionError, match="built again"):
        cache.load_or_build("clips", "f", not_called)
    with pytest.raises(ValueError, match="no tensors"):
        cache.load_or_build("clips", "f", dict)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        FeatureCache(tmp_path).load_or_build("clips", "f", features)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    earlier = os.umask(umask)
    try:
        cache = FeatureCache(tmp_path)
        cache.load_or_build("clips", "f", features)
    finally:
        os.umask(earlier)
    assert [p.name for p in tmp_path.iterdir()] == [cache.path("clips", "f").name]
    assert cache.path("clips", "f").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("name", ["", "a/b", "../b"])
def test_name_must_be_a_file_name(tmp_path, name):
    with pytest.raises(ValueError, match=r"name .* must be a plain file name"):
        FeatureCache(tmp_path).load_or_build(name, "f", features)


def test_kept_features_can_be_trained_on(tmp_path):
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        kept = cache.load_or_build("clips", "f", features)["features"]
        weight = torch.ones(5, requires_grad=True)
        (kept.float() @ weight).sum().backward()
        torch.testing.assert_close(weight.grad, kept.float().sum((0, 1)))


def media_set(**changes) -> MediaSet:
    fields = {
        "features": torch.zeros(2, 3, 4, dtype=torch.float16),
        "lengths": torch.tensor([1, 3]),
        "labels": [{"color": "red"}, {}],
    }
    return MediaSet(**(fields | changes))


def test_media_set_has_as_many_items_as_labels():
    assert len(media_set()) == 2
    nothing = media_set(
        features=torch.zeros(0, 3, 4).half(), lengths=torch.zeros(0, dtype=torch.int64), labels=[]
    )
    assert len(nothing) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(2, 3, 4)}, r"features .*float32.* must be float16"),
        ({"features": torch.zeros(2, 3).half()}, r"features .*\[2, 3\].* must be float16"),
        ({"lengths": torch.tensor([1])}, r"lengths .*\[1\].* must be int64 of shape \[2\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, r"lengths .*float32"),
        ({"lengths": torch.tensor([0, 3])}, r"lengths \(0 to 3\) must be between 1 and .*\(3\)"),
        ({"lengths": torch.tensor([1, 4])}, r"lengths \(1 to 4\)"),
        ({"labels": [{}]}, r"labels \(1\) must be as many as features \(2\)"),
    ],
)
def test_media_set_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        media_set(**changes)
