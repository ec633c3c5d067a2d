"""Decoding through transformers with a static cache and compiled steps, on `"unimoe"`."""

import pytest
import torch
import transformers
from test_transformers import build


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_compiled_step_gives_the_tokens_of_a_plain_one(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = transformers.CompileConfig(
        fullgraph=True, dynamic=False, backend="aot_eager", mode=None
    )
    config._compile_all_devices = True
    prompt = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = build(name, "eager").eval().generate(prompt, **options)
    model = build(name, "unimoe").eval()
    compiled = model.generate(
        prompt, **options, cache_implementation="static", compile_config=config
    )
    assert compiled.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
