"""The precision of a run depends on the instructions of the device."""

import warnings

import pytest
import torch

from unimoe_model import precision
from unimoe_model.precision import multiplies_bf16, resolve_dtype, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """Makes this CPU one with or without instructions for bfloat16."""
    precision.warn_of_slow_bf16.cache_clear()

    def pretend(has_bf16):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
        capability = "AVX512" if has_bf16 else "AVX2"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    yield pretend
    precision.warn_of_slow_bf16.cache_clear()


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_where_there_are_instructions(cpu, has_bf16, expected):
    cpu(has_bf16)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"


def test_limits_of_the_environment_count(cpu, monkeypatch):
    cpu(True)
    assert multiplies_bf16(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not multiplies_bf16(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert multiplies_bf16(CPU)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not multiplies_bf16(CPU)


def test_bfloat16_without_instructions_is_kept_and_warned_of_once(cpu):
    cpu(False)
    with pytest.warns(RuntimeWarning, match="no bfloat16 instructions: torch's matmuls"):
        assert resolve_precision("bf16", CPU) == "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_precision("bf16", CPU) == "bf16"
        cpu(True)
        assert resolve_precision("bf16", CPU) == "bf16"


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match=r"precision \('fp16'\) must be one of auto, bf16, fp32"):
        resolve_precision("fp16", CPU)


def test_weights_of_16_bits_become_what_the_cpu_multiplies(cpu):
    cpu(False)
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        assert resolve_dtype("auto", stored, CPU) == torch.float32
    cpu(True)
    for stored in (torch.bfloat16, torch.float16):
        assert resolve_dtype("auto", stored, CPU) == torch.bfloat16
    assert resolve_dtype("auto", torch.float32, CPU) == torch.float32
    assert resolve_dtype("fp32", torch.bfloat16, CPU) == torch.float32
    assert resolve_dtype("auto", torch.float16, torch.device("cuda")) == torch.float16
