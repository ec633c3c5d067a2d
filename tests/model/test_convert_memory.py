"""Peak memory of converting a checkpoint of 2 GB, in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from published_checkpoints import EXPERTS, VOCAB, published_config
from safetensors.torch import save_file

WIDTH, INNER, LAYERS, FILES = 1024, 2816, 26, 4
CONVERT = """
import sys
from pathlib import Path
from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published
source, ours, back, tokenizer = map(Path, sys.argv[1:])
{call}
# Not ru_maxrss, which keeps what the process was forked from.
status = Path("/proc/self/status").read_text()
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""
THERE = "convert_from_published(source, ours, tokenizer=tokenizer)"
BACK = "convert_to_published(ours, back)"


def layers():
    """Weights of one layer after the other, so that only one is in memory."""
    like = {"dtype": torch.bfloat16}
    yield {
        "model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, **like),
        "lm_head.weight": torch.randn(VOCAB, WIDTH, **like),
        "model.norm.weight": torch.randn(WIDTH, **like),
    }
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        state = {f"{prefix}mlp.gate.weight": torch.randn(EXPERTS, WIDTH, **like)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = torch.randn(WIDTH, **like)
        for name in "qkvo":
            state[f"{prefix}self_attn.{name}_proj.weight"] = torch.randn(WIDTH, WIDTH, **like)
        for expert in range(EXPERTS):
            for name, shape in shapes.items():
                key = f"{prefix}mlp.experts.{expert}.{name}_proj.weight"
                state[key] = torch.randn(*shape, **like)
        yield state


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
def test_memory_stays_below_two_files_and_a_gigabyte(tmp_path, tokenizer_folder, pickled):
    source = tmp_path / "source"
    source.mkdir()
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    parts, weight_map, largest, total = list(layers()), {}, 0, 0
    for number in range(FILES):
        state = {k: v for part in parts[number::FILES] for k, v in part.items()}
        file = source / f"{stem}-{number + 1:05}-of-{FILES:05}{suffix}"
        torch.save(state, file) if pickled else save_file(state, file)
        weight_map |= dict.fromkeys(state, file.name)
        largest = max(largest, file.stat().st_size)
        total += file.stat().st_size
    del parts, state
    index = {"metadata": {}, "weight_map": weight_map}
    (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
    }
    (source / "config.json").write_text(json.dumps(published_config(**sizes)))
    assert 1.9e9 < total < 2.2e9
    for call in (THERE, BACK):
        folders = [source, tmp_path / "ours", tmp_path / "back", tokenizer_folder]
        command = [sys.executable, "-c", CONVERT.format(call=call), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.splitlines()[-1])
        assert peak < 1e9 + 2 * largest
        print(f"{suffix} {call.partition('(')[0]}: {peak / 1e6:.0f} MB, file {largest / 1e6:.0f}")
