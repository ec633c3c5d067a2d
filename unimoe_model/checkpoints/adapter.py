"""Adapters of the published third stage: LoRA, and files that replace tensors of the base."""

import json
import re
from collections import defaultdict
from pathlib import Path

from unimoe_model.checkpoints.files import PICKLED, SAFETENSORS, TensorFiles, single_file
from unimoe_model.checkpoints.plan import Lora

CONFIG = "adapter_config.json"
_LORA = "adapter_model"
# In the order in which the published loader reads them.
_REPLACEMENTS = ("non_lora_trainables", "mm_audio_aligner", "mlp_gates")
_PEFT = "base_model.model."
_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")


def add_adapter(files: TensorFiles, folder: Path) -> dict[str, Lora]:
    """Adds an adapter to the files of its base.

    If routers have LoRA, the published file `mlp_gates` holds them without it, and the published
    loader discards it; here the LoRA of routers is merged like any other.

    Args:
        files: files of the base; tensors of the adapter replace those of the same name.
        folder: folder with `adapter_config.json`, `adapter_model` and any of
            `non_lora_trainables`, `mm_audio_aligner` and `mlp_gates`, as `.safetensors` or `.bin`.

    Returns:
        The LoRA of each weight, by the weight's name.

    Raises:
        ValueError: If a file is missing or damaged, or has only one half of a LoRA.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
    except (OSError, KeyError, TypeError, ZeroDivisionError, json.JSONDecodeError) as error:
        raise ValueError(f"file {folder / CONFIG} must be that of a LoRA: {error!r}") from error
    for option in ("fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(option):
            raise ValueError(
                f"file {folder / CONFIG} must be of a plain LoRA, has {option} ({config[option]})"
            )
    lora_path = single_file(folder, _LORA)
    if lora_path is None:
        raise ValueError(f"folder ({folder}) must hold {_LORA}{SAFETENSORS} or {PICKLED}")
    lora_files = TensorFiles([lora_path], published_adapter_name)
    files.join(lora_files)
    halves = defaultdict(dict)
    for name in lora_files.meta:
        base, _, half = name.partition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise ValueError(f"file {lora_path}: {name} is neither A nor B of a LoRA")
        halves[base][half[0]] = name
    for base, found in halves.items():
        if found.keys() != {"A", "B"}:
            raise ValueError(
                f"file {lora_path}: LoRA of {base} must have A and B, has {min(found)}"
            )
    _add_expert_loras(files, folder)
    for path in filter(None, (single_file(folder, stem) for stem in _REPLACEMENTS)):
        replaced = TensorFiles([path], published_adapter_name)
        again = [n for n in replaced.meta if ".lora_" in n and n not in lora_files.meta]
        if again:
            raise ValueError(f"file {path}: {again[0]} is a LoRA that {lora_path.name} lacks")
        files.join(replaced)
    return {f"{base}.weight": Lora(found["A"], found["B"], scale) for base, found in halves.items()}


def _add_expert_loras(files: TensorFiles, folder: Path) -> None:
    """Adds the files `<number>_mlp_experts` of the eight-expert code, one per expert.

    Each was written by a rank that numbered its experts from 0; files with global numbers are
    accepted as well.
    """
    paths = {
        int(path.name.split("_")[0]): path
        for suffix in (SAFETENSORS, PICKLED)
        for path in folder.glob(f"[0-9]*_mlp_experts{suffix}")
    }
    held = {int(match[1]) for name in files.meta if (match := _EXPERT.search(name))}
    missing = sorted((held or set(range(max(paths, default=-1) + 1))) - paths.keys())
    if paths and missing:
        raise ValueError(
            f"folder ({folder}) must hold a file <number>_mlp_experts for every expert; that of"
            f" expert {missing[0]} is missing"
        )
    for number, path in sorted(paths.items()):
        names = TensorFiles([path], published_adapter_name).meta
        found = {int(match[1]) for name in names if (match := _EXPERT.search(name))}
        if found not in ({0}, {number}):
            raise ValueError(f"file {path} must be of expert {number}, holds {sorted(found)}")
        files.add(
            [path],
            lambda name, number=number: _EXPERT.sub(
                f".deepspeed_experts.{number}.", published_adapter_name(name)
            ),
        )


def published_adapter_name(name: str) -> str:
    """The name in the base model of the adapter's tensor `base_model.model.<name>`."""
    return name.removeprefix(_PEFT).replace(".default.", ".")
