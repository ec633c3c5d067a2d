import pytest

from unimoe_model.presets import PRESETS, llm_parameters, preset

# Table 1 of the paper, to the last parameter.
SIZES = {
    "uni-moe-7b-4e": (8_902_676_480, 13_231_198_208),
    "uni-moe-7b-4e-all": (11_066_937_344, 19_723_980_800),
    "uni-moe-7b-8e": (8_902_676_480, 21_888_241_664),
    "uni-moe-7b-8e-all": (11_066_937_344, 37_038_067_712),
}


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name):
    assert llm_parameters(preset(name)) == SIZES[name]


def test_connectors_of_the_published_sizes():
    import torch

    from unimoe_model.modeling import UniMoEForConditionalGeneration

    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(preset("uni-moe-7b-4e")).model

    def millions(module):
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)

    assert millions(model.image_connector) == 20.98
    assert millions(model.audio_connector) == 102.43
    # The published 156.77 M hold a token embedding of 51865 x 768 that is never used.
    assert round(millions(model.speech_connector) + (51865 - 1) * 768 / 1e6, 2) == 156.77


def test_the_paper_s_four_layer_connectors_are_an_option():
    fields = {
        "speech_connector": {"decoder_layers": 4},
        "audio_connector": {"num_hidden_layers": 4},
    }
    config = preset("uni-moe-7b-4e", **fields)
    assert config.speech_connector["decoder_layers"] == 4
    assert config.speech_connector["d_model"] == 768
    assert config.audio_connector["num_hidden_layers"] == 4
    assert config.audio_connector["cross_attention_frequency"] == 2


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset \('uni-moe-70b'\) must be one of"):
        preset("uni-moe-70b")
