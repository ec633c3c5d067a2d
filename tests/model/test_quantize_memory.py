"""Peak memory of quantising a folder of 1 GB, in a process of its own."""

import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

QUANTIZE = """
import sys
from pathlib import Path
from unimoe_kernels.integrations import quantized_loading
from unimoe_model.quantizing import quantize_folder

def held():
    # Without pages of mapped files, which the system takes back when it needs them.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])

peak, quantize = 0, quantized_loading.quantize_weight

def noting(*args, **options):
    global peak
    peak = max(peak, held())
    return quantize(*args, **options)

quantized_loading.quantize_weight = noting
import transformers
start = held()
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), "int4", 64)
print(max(peak, held()) - start)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_quantized_model_and_a_layer(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=20,
    )
    config.dtype = torch.bfloat16
    model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    floats = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    stacked = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    model.save_pretrained(tmp_path / "float")
    del model
    command = [sys.executable, "-c", QUANTIZE, str(tmp_path / "float"), str(tmp_path / "int4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    quantized = floats - stacked + stacked * 4.25 / 16
    print(f"{peak / 1e6:.0f} MB; quantised {quantized / 1e6:.0f}, layer {layer / 1e6:.0f}")
    assert 0.9e9 < floats < 1.2e9
    # Beside the layer, what its conversion and the process itself take.
    assert peak < quantized + 3 * layer
    assert peak < 0.6 * floats
