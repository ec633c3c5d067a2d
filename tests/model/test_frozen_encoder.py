"""Behaviour common to all frozen encoders."""

import numpy as np
import pytest
import torch
from torch import nn

from unimoe_model.encoders import FrozenEncoder
from unimoe_model.encoders.base import check_waveforms


class Ears(FrozenEncoder):
    """Sums of a recording's pairs of samples, scaled."""

    def __init__(self, name="ears"):
        super().__init__(name, 2, stand_in_for="BEATs")
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
        self.freeze()

    def encode_recording(self, samples, *max_rows):
        rows = self.layer(torch.from_numpy(samples).unflatten(0, (-1, 2)))
        return list(rows.split(*max_rows or (2,)))


def test_an_encoder_stays_frozen_in_a_model_that_trains():
    encoder = Ears()
    host = nn.Sequential(encoder, nn.Linear(2, 2))
    host.train()
    assert not any(module.training for module in encoder.modules())
    assert host[1].training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert host[1].weight.requires_grad


def test_a_fingerprint_follows_name_and_weights():
    encoder = Ears()
    before = encoder.fingerprint()
    assert encoder.fingerprint() == before
    other = Ears("other")
    other.load_state_dict(encoder.state_dict())
    assert other.fingerprint() != before
    encoder.layer[0].weight[1, 1] += 1e-6
    changed = encoder.fingerprint()
    assert changed != before
    encoder.layer[2].running_mean[0] = 1
    assert encoder.fingerprint() not in (before, changed)


def test_a_fingerprint_follows_the_dtype():
    encoder = Ears()
    for tensor in encoder.state_dict().values():
        tensor.zero_()
    before = encoder.fingerprint()
    assert encoder.double().fingerprint() != before


def test_an_empty_encoder_has_sizes_and_no_weights():
    encoder = Ears.empty()
    assert (encoder.feature_size, encoder.stand_in_for, encoder.picture_tokens) == (
        2,
        "BEATs",
        None,
    )
    assert all(tensor.is_meta for tensor in encoder.state_dict().values())


def test_recordings_are_encoded_one_by_one():
    encoder = Ears()
    recordings = [np.arange(n, dtype=np.float32) for n in (4, 10)]
    for max_rows in ((), (3,)):
        together = encoder.encode_recordings(recordings, *max_rows)
        assert len(together) == 2
        for samples, pieces in zip(recordings, together, strict=True):
            alone = encoder.encode_recording(samples, *max_rows)
            assert all(map(torch.equal, pieces, alone))
            assert len(pieces) == len(alone)


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(9), r"waveforms \(torch\.float32 of shape \[9\]\) must be floating point"),
        (torch.zeros(1, 9, dtype=torch.int16), r"waveforms \(torch\.int16 of shape \[1, 9\]\)"),
    ],
)
def test_waveforms_are_checked(waveforms, message):
    with pytest.raises(ValueError, match=message):
        check_waveforms(waveforms)


def test_good_waveforms_pass():
    for dtype in (torch.float32, torch.bfloat16):
        check_waveforms(torch.zeros(2, 9, dtype=dtype))
