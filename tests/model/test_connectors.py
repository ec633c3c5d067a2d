import pytest
import torch

from unimoe_kernels.testing import relative_error
from unimoe_model.connectors import AudioConnector, ImageConnector, SpeechConnector

DECODER = {
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "max_target_positions": 8,
    "init_std": 0.3,
}
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "cross_attention_frequency": 2,
}


def test_image_connector_is_two_linear_maps_with_a_gelu_between():
    connector = ImageConnector(12, 32).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    first, _, second = connector.projector
    hidden = x @ first.weight.T + first.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    assert relative_error(connector(x), hidden @ second.weight.T + second.bias) < 1e-12


def test_the_hidden_layer_of_the_image_connector_may_have_another_width():
    connector = ImageConnector(12, 32, 20)
    assert [tuple(layer.weight.shape) for layer in connector.projector[::2]] == [(20, 12), (32, 20)]
    assert connector(torch.randn(2, 3, 12)).shape == (2, 3, 32)


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 5, 3, 12), (0, 3, 12)])
def test_pooled_tokens_are_parts_of_the_output_for_the_mean_of_the_patches(shape):
    connector = ImageConnector(12, 32, 20, pooled_tokens=4).double()
    x = torch.randn(shape, dtype=torch.float64)
    mean = x.mean(-2)
    mean = mean - mean.mean(-1, keepdim=True)
    whole = connector.projector(mean / (mean.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    if len(shape) == 4:
        whole = whole.mean(1)
    found = connector(x)
    assert found.shape == (shape[0], 4, 32)
    if len(found):
        assert relative_error(found, torch.stack(whole.split(32, -1), 1)) < 1e-12


def test_video_is_the_mean_of_its_projected_frames():
    connector = ImageConnector(12, 32)
    frames = torch.randn(2, 5, 3, 12)
    mean = torch.stack([connector(frames[:, i]) for i in range(5)]).mean(0)
    assert relative_error(connector(frames), mean) < 1e-6
    projected_mean = connector(frames.mean(1))
    assert relative_error(projected_mean, mean) > 1e-3, "the mean must come after the projector"


def speech_connector(**fields):
    connector = SpeechConnector(16, 32, 4, {**DECODER, **fields}).eval()
    torch.nn.init.normal_(connector.query_tokens)
    return connector


def test_speech_queries_see_only_queries_before_them():
    connector = speech_connector()
    features = torch.randn(1, 6, 16)
    before = connector(features)
    with torch.no_grad():
        connector.query_tokens[:, 2] += torch.randn(16)
    after = connector(features)
    assert torch.equal(before[:, :2], after[:, :2])
    assert relative_error(after[:, 2:], before[:, 2:]) > 1e-2


def test_speech_queries_see_all_frames():
    connector = speech_connector()
    features = torch.randn(1, 6, 16)
    changed = features.clone()
    changed[:, 5] += 1
    difference = (connector(changed) - connector(features)).abs().amax(-1)
    assert (difference > 1e-4).all()


def test_speech_connector_takes_over_a_whisper_decoder():
    source, target = speech_connector(), speech_connector()
    published = {**source.decoder.state_dict(), "embed_tokens.weight": torch.randn(99, 16)}
    target.load_decoder(published)
    with torch.no_grad():
        target.query_tokens.copy_(source.query_tokens)
    features = torch.randn(2, 6, 16)
    assert torch.equal(target.hidden_states(features), source.hidden_states(features))


def test_speech_connector_checks_its_sizes():
    with pytest.raises(ValueError, match=r"feature_size \(12\).*\(16\)"):
        SpeechConnector(12, 32, 4, DECODER)
    with pytest.raises(ValueError, match=r"num_queries \(9\).*max_target_positions \(8\)"):
        SpeechConnector(16, 32, 9, DECODER)


def test_audio_queries_see_each_other_and_all_frames():
    connector = AudioConnector(10, 32, 3, QFORMER).eval()
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, 5, 10)
    before = connector(features)
    assert before.shape == (2, 3, 32)
    changed = features.clone()
    changed[0, 4] += 1
    after = connector(changed)
    assert ((after - before)[0].abs().amax(-1) > 1e-4).all()
    assert torch.equal(after[1], before[1])
    with torch.no_grad():
        connector.query_tokens[:, 2] += torch.randn(16)
    assert ((connector(features) - before).abs().amax(-1) > 1e-5).all()


def test_audio_queries_start_different():
    connector = AudioConnector(10, 32, 3, QFORMER)
    tokens = connector.eval()(torch.randn(1, 5, 10))[0]
    assert not torch.allclose(tokens[0], tokens[1])


def test_audio_connector_needs_a_query():
    with pytest.raises(ValueError, match=r"num_queries \(0\) must be at least 1"):
        AudioConnector(10, 32, 0, QFORMER)
