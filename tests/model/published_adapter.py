"""Folders of an adapter and its base, as the published code leaves them."""

import json

from published import Case, below
from safetensors.torch import load_file, save_file


def base_of_adapter(folder):
    """Writes the base model of the case `lora_merge` to a new folder.

    Returns:
        The folders of model and tokenizer, and what must be known besides to convert it.
    """
    case = Case("end_to_end_speech")
    tokenizer = Case("prompt_labels").folder
    folder.mkdir()
    save_file(case.tensors("weights"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    known = {
        "speech_connector": Case("speech_connector").config["whisper"],
        "audio_connector": {"num_hidden_layers": 1},
        "media_token_ids": None,
    }
    return folder, tokenizer, known


def copy_adapter(case, folder, suffix):
    """Copies the adapter of a case, with weights in files of one kind, to a new folder."""
    folder.mkdir()
    for path in (case.folder / "adapter").iterdir():
        if path.suffix in (".json", f".{suffix}"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_router_adapter(case, folder, base):
    """Writes the adapter of a case that has LoRA on the routers, and its base's other routers."""
    variant = case.tensors("gate_lora_variant")
    state = load_file(base / "model.safetensors") | below(variant, "base.")
    save_file(state, base / "model.safetensors")
    folder.mkdir()
    config = (case.folder / "adapter" / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config)
    save_file(below(variant, "adapter."), folder / "adapter_model.safetensors")
    save_file(below(variant, "gates_file."), folder / "mlp_gates.safetensors")
    return folder, variant
