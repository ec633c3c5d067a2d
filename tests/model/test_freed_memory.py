"""Memory that glibc keeps between training steps."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only"),
    pytest.mark.skipif(
        HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
        reason="faults are of huge pages",
    ),
]

STEPS = """
import resource, sys
import torch
from unimoe_model.training.freed_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
MIB = 2**20

def step():
    held = [torch.ones(24 * MIB, dtype=torch.uint8) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(4):
    step()
print((faults() - before) * resource.getpagesize() / (4 * 8 * 24 * MIB))
"""


def test_steps_fault_in_no_page_again():
    """Faults as a share of the pages that steps use."""
    # glibc's own choice depends on the sizes that imports have freed.
    returns = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    shares = {}
    for name in ("kept", "returned"):
        given = [sys.executable, "-c", STEPS, name]
        done = subprocess.run(given, capture_output=True, text=True, check=True, env=returns)
        shares[name] = float(done.stdout)
    assert shares["kept"] < 0.05
    assert shares["returned"] > 0.9
