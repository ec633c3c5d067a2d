"""Adapters of the published third stage: LoRA, and files that replace parts of the base."""

import json
import re
from pathlib import Path

from unimoe_model.checkpoints.files import PICKLED, SAFETENSORS, TensorFiles
from unimoe_model.checkpoints.plan import Lora

CONFIG = "adapter_config.json"
_LORA = "adapter_model"
# In the order in which the published loader reads them.
_REPLACEMENTS = ("non_lora_trainables", "mm_audio_aligner", "mlp_gates")
_PEFT = "base_model.model."
_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")


def add_adapter(files: TensorFiles, folder: Path) -> dict[str, Lora]:
    """Adds an adapter to the files of its base.

    Where routers have LoRA, the published file of gates holds them without it, and its loader
    drops what was learned; here the LoRA of a router is merged like all others.

    Args:
        files: of the base; the adapter's replacements take the place of what they replace.
        folder: holds `adapter_config.json`, `adapter_model` and any of `non_lora_trainables`,
            `mm_audio_aligner` and `mlp_gates`, as `.safetensors` or `.bin`.

    Returns:
        The corrections, by the name of what they correct.

    Raises:
        ValueError: If a file is missing or damaged, has half a LoRA, or replaces what is not there.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
    except (OSError, KeyError, TypeError, ZeroDivisionError, json.JSONDecodeError) as error:
        raise ValueError(f"file {folder / CONFIG} must be that of a LoRA: {error!r}") from error
    if config.get("fan_in_fan_out") or config.get("use_rslora") or config.get("use_dora"):
        raise ValueError(f"file {folder / CONFIG} must be of a plain LoRA")
    lora_path = _one(folder, _LORA)
    if lora_path is None:
        raise ValueError(f"folder ({folder}) must hold {_LORA}{SAFETENSORS} or {PICKLED}")
    lora_names = TensorFiles([lora_path], published_adapter_name).shapes
    files.add([lora_path], published_adapter_name)
    loras = {}
    for name in lora_names:
        base, found, half = name.partition(".lora_A.")
        if not found:
            if ".lora_B." not in name:
                raise ValueError(f"file {lora_path}: {name} is neither A nor B of a LoRA")
            if name.replace(".lora_B.", ".lora_A.") not in lora_names:
                raise ValueError(f"file {lora_path}: {name} has no A")
            continue
        other = f"{base}.lora_B.{half}"
        if other not in lora_names:
            raise ValueError(f"file {lora_path}: {name} has no B")
        loras[f"{base}.weight"] = Lora(name, other, scale)
    replacements = [path for stem in _REPLACEMENTS if (path := _one(folder, stem))]
    _add_expert_loras(files, folder)
    for path in replacements:
        replaced = TensorFiles([path], published_adapter_name)
        again = [n for n in replaced.shapes if ".lora_" in n and n not in lora_names]
        if again:
            raise ValueError(f"file {path}: {again[0]} is a LoRA that {lora_path.name} lacks")
        files.add([path], published_adapter_name)
    return loras


def _add_expert_loras(files: TensorFiles, folder: Path) -> None:
    """Adds the files `<number>_mlp_experts`, one an expert, of the eight-expert code.

    Each was written by a rank that numbered its experts from 0; files that number them throughout
    are taken as they are.
    """
    paths = {
        int(path.name.split("_")[0]): path
        for suffix in (SAFETENSORS, PICKLED)
        for path in folder.glob(f"[0-9]*_mlp_experts{suffix}")
    }
    for number, path in sorted(paths.items()):
        names = TensorFiles([path], published_adapter_name).shapes
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
    """The name in the base of what an adapter's file calls `base_model.model.<name>`."""
    return name.removeprefix(_PEFT).replace(".default.", ".")


def _one(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{suffix}" for suffix in (SAFETENSORS, PICKLED)]
    return next((path for path in found if path.is_file()), None)
