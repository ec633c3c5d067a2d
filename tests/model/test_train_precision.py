"""`precision: auto` on a CPU without bfloat16 instructions: no stage multiplies in bfloat16."""

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from recipe_case import write_case

from unimoe_model.cli import main

WORDS = {
    "name": "words",
    "train": "language_model",
    "data": ["pictures"],
    "steps": 2,
    "batch_size": 6,
    "learning_rate": 1e-3,
    "muon_learning_rate": 1e-3,
}


class Multiplications(TorchDispatchMode):
    """Records the dtypes of everything that multiplies matrices or convolves."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if any(part in name for part in ("mm", "linear", "conv", "attention", "moe_mlp", "lora")):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self.seen.setdefault(name, set()).update(t.dtype for t in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_instructions", [False, True])
def test_auto_multiplies_in_bfloat16_only_with_instructions(
    tmp_path, monkeypatch, has_instructions
):
    for module in ("precision", "training.optimization"):
        name = f"unimoe_model.{module}.multiplies_bf16"
        monkeypatch.setattr(name, lambda device: has_instructions)
    case = write_case(tmp_path / "case")
    recipe = yaml.safe_load(case.read_text()) | {"precision": "auto"}
    del recipe["evaluate"]
    recipe["stages"].insert(0, WORDS)
    for stage in recipe["stages"]:
        if "epochs" in stage:
            del stage["epochs"]
        stage["steps"] = 2
    case.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with Multiplications() as multiplications:
        assert main(["train", str(case), "--output", str(tmp_path / "run")]) == 0
    seen = multiplications.seen
    assert {"mm.default", "addmm.default", "baddbmm.default", "grouped_mm.default"} <= seen.keys()
    assert (torch.bfloat16 in set().union(*seen.values())) == has_instructions
