"""`generate` with a static cache and a compiled decoding step, as transformers does it on GPUs."""

import pytest
import torch
from transformers import CompileConfig
from transformers.generation import GenerationMixin


@pytest.fixture
def compile_config():
    """Compiles decoding steps as one graph on any device; without code generation, to be quick."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    yield config
    torch._dynamo.reset()


def test_a_compiled_step_gives_the_tokens_of_a_plain_one(
    tiny_model, media_prompt, features, compile_config
):
    model = tiny_model()
    media = {"image_features": features("image"), "audio_features": features("audio")}
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    ids = media_prompt("image", "audio")
    expected = model.generate(ids, **media, **options)
    compiled = model.generate(
        ids, **media, **options, cache_implementation="static", compile_config=compile_config
    )
    assert compiled.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_transformers_compiles_the_model_without_being_asked(tiny_model):
    model = tiny_model()
    assert isinstance(model, GenerationMixin)
    assert model._can_compile_fullgraph
