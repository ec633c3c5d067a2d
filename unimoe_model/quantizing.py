"""Quantisation of the experts of a model folder, as run by `unimoe quantize`."""

import json
import shutil
from pathlib import Path

import torch

from unimoe_kernels import load_and_quantize, quantize_experts, register_with_transformers
from unimoe_model.auto import register_auto_classes
from unimoe_model.calibration_data import calibration_inputs
from unimoe_model.checkpoints.files import shards
from unimoe_model.checkpoints.writing import refuse_existing, whole_folder

# Files written by `save_pretrained`; all other files, such as those of the tokenizer, are copied.
_WRITTEN = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def quantize_folder(
    source: Path,
    target: Path,
    format: str,
    group_size: int | None = None,
    zero_points: bool = False,
    calibrate: Path | None = None,
) -> tuple[int, int]:
    """Writes a copy of a model folder with quantised experts.

    Weights are read one after the other, and at most one float expert weight is in memory. With
    calibration data the model has to run, so that the whole float model is in memory.

    Args:
        source: folder of a Uni-MoE, or of a transformers model with a selectable experts
            implementation, in safetensors.
        target: new folder, written whole or not at all; `load_quantized` loads it.
        format: see `quantize_experts`.
        group_size: see `quantize_experts`.
        zero_points: see `quantize_experts`.
        calibrate: None to round to nearest, or a data file; see `calibration_inputs`.

    Returns:
        Size in bytes of the source's weight files, and of the quantised model's weights.

    Raises:
        ValueError: If `target` exists, `source` is not such a model, or the model cannot be
            quantised with these options.
    """
    refuse_existing(target)
    if not (source / "config.json").is_file():
        raise ValueError(f"model ({source}) must be a folder with a config.json")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"model ({source}) is quantised already: {config['quantization_config']}")
    before = sum(path.stat().st_size for path in shards(source))
    register_auto_classes()
    if calibrate is None:
        model = load_and_quantize(source, format, group_size, zero_points)
    else:
        model = _calibrated(source, calibrate, format, group_size, zero_points)
    with whole_folder(target) as partial:
        for path in source.iterdir():
            if path.is_file() and not any(path.match(name) for name in _WRITTEN):
                shutil.copyfile(path, partial / path.name)
        model.save_pretrained(partial)
    return before, _bytes(model)


def _calibrated(source: Path, file: Path, *options: object) -> torch.nn.Module:
    """Returns the model with its experts quantised and calibrated on the data of a file."""
    from transformers import AutoModelForCausalLM

    register_with_transformers()
    inputs = calibration_inputs(source, file)
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", output_loading_info=True
    )
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise ValueError(f"model ({source}) must hold the weights of its config, such as {missing}")
    format, group_size, zero_points = options
    return quantize_experts(model, format, group_size, zero_points=zero_points, calibration=inputs)


def _bytes(model: torch.nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
