import pytest
from transformers import LlamaConfig

from unimoe_model.configuration import UniMoEConfig


def test_defaults_are_the_published_model():
    config = UniMoEConfig()
    assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
    assert config.num_soft_tokens("image") == config.num_soft_tokens("video") == 576
    assert config.speech_connector["decoder_layers"] == 12
    assert all(config.is_moe_layer(i) for i in range(config.text_config.num_hidden_layers))


def test_saved_and_loaded_configuration_is_the_same(tiny_config, tmp_path):
    config = tiny_config(moe_layers="even", load_balancing_coef=0.1, router_z_coef=0.01)
    config.save_pretrained(tmp_path)
    loaded = UniMoEConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.text_config, LlamaConfig)
    assert loaded.to_dict() == config.to_dict()


def test_given_text_configuration_is_kept():
    text = LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=50)
    config = UniMoEConfig(text_config=text)
    assert config.text_config is text
    assert sorted(config.media_token_ids.values()) == [50, 51, 52, 53]


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"moe_layers": "even"}, [0, 2, 4]),
        ({"moe_layers": "first_half"}, [0, 1]),
        ({"moe_layers": "second_half"}, [2, 3, 4]),
        ({"moe_layers": [4, 1]}, [1, 4]),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_hold_experts(tiny_config, fields, layers):
    config = tiny_config(text_config={"num_hidden_layers": 5}, **fields)
    assert [i for i in range(5) if config.is_moe_layer(i)] == layers


def test_soft_tokens_of_every_kind(tiny_config):
    config = tiny_config()
    numbers = {kind: config.num_soft_tokens(kind) for kind in config.media_token_ids}
    assert numbers == {"image": 3, "video": 3, "speech": 4, "audio": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) .* num_experts \(4\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\)"),
        ({"num_experts": -1}, r"num_experts \(-1\)"),
        ({"moe_layers": "odd"}, r"moe_layers \('odd'\) must be one of .*'second_half'"),
        ({"moe_layers": [0, 2]}, r"moe_layers \(\[0, 2\]\) .* below num_hidden_layers \(2\)"),
        ({"moe_layers": [1, 1]}, r"moe_layers \(\[1, 1\]\)"),
        ({"modality_expert_coef": 0.1}, r"modality_expert_coef \(0.1\) requires modality_experts"),
        ({"modality_experts": {"image": [4]}}, r"modality_experts \(image: \[4\]\)"),
        ({"expert_origins": ["a"]}, r"expert_origins \(\['a'\]\) must name num_experts \(4\)"),
        ({"media_token_ids": {"image": 1}}, r"missing \['video', 'speech', 'audio'\]"),
    ],
)
def test_wrong_fields_are_refused(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
