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


@pytest.mark.gpu
def test_a_decoding_step_is_captured_by_a_graph():
    """A step reads its token and its position from memory, so that a replay decodes the next."""
    model = build("qwen3_moe", "unimoe").eval().cuda()
    prompt = torch.arange(3, 10, device="cuda")[None]
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    token = torch.full((1, 1), 5, device="cuda")
    position = torch.full((1, 1), prompt.shape[1], device="cuda")

    def step():
        return model(token, position_ids=position, past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
        step()  # compiles kernels
        cache.reset()
        model(prompt, past_key_values=cache, use_cache=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            cache.reset()
            model(prompt, past_key_values=cache, use_cache=True)
            token.random_(3, 40)
            expected = model(torch.cat([prompt, token], dim=1)).logits[:, -1]
            graph.replay()
            assert (captured[:, -1] - expected).abs().max() < 1e-3
