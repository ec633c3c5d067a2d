"""Loading of saved models with quantised experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from unimoe_kernels.integrations import upcycle
from unimoe_kernels.integrations.model_experts import all_experts
from unimoe_kernels.integrations.quantize import METHOD, RECORD, convert, mark
from unimoe_kernels.integrations.transformers import register_with_transformers


def load_quantized(folder: str | Path, **kwargs: Any) -> nn.Module:
    """Loads a model with quantised experts that was saved with `save_pretrained`.

    Everything but the experts is loaded as by `from_pretrained`. The model is built on the meta
    device, its experts are replaced by quantised ones, and the files are read into them. The float
    weights of the experts are never created.

    Args:
        folder: folder with config.json and safetensors files.
        **kwargs: passed to `from_pretrained` of transformers, such as `dtype` (by default the saved
            one) and `device_map`.

    Returns:
        The model in evaluation mode, with `experts_implementation="unimoe"` if the experts are
        those of transformers.

    Raises:
        ImportError: If transformers is missing.
        FileNotFoundError: If the folder has no safetensors file.
        ValueError: If the configuration is not that of a model with quantised experts, or
            `output_loading_info` is given.
        RuntimeError: If weights are missing, unexpected or of another shape.
    """
    import transformers

    register_with_transformers()
    if "output_loading_info" in kwargs:
        raise ValueError("output_loading_info must not be given: weights that do not fit raise")
    if not any(Path(folder).glob("[!.]*.safetensors")):
        raise FileNotFoundError(f"folder ({folder}) holds no safetensors file")
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(folder)
    record = getattr(config, RECORD, None)
    if not isinstance(record, dict) or record.get("quantized_by") != METHOD:
        raise ValueError(
            f"folder ({folder}) holds no model with quantised experts: {RECORD} ({record}) of its"
            f" config must have quantized_by {METHOD!r}"
        )
    options = (record["format"], record["group_size"], record["zero_points"])
    # If present, transformers would look for one of its own quantisers.
    delattr(config, RECORD)
    own = class_of(config)
    upcycled = getattr(config, upcycle.RECORD, None)
    base = own if upcycled is None else upcycle.upcycled_class(own, upcycled)
    model, report = _quantized_class(base, options).from_pretrained(
        folder, config=config, output_loading_info=True, **kwargs
    )
    model.__class__ = own
    wrong = {key: sorted(map(str, found)) for key, found in report.items() if found}
    if wrong:
        raise RuntimeError(f"folder ({folder}) does not fit its config: {wrong}")
    if hasattr(model, "set_experts_implementation") and _has_foreign_experts(model):
        model.set_experts_implementation(METHOD)
    mark(model, *options)
    return model


def class_of(config: Any) -> type[nn.Module]:
    """Returns the class of the saved model, as named by its configuration."""
    import transformers

    (name, *_) = config.architectures or [None]
    found = getattr(transformers, name or "", None)
    if found is not None:
        return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        kind = auto._model_mapping.get(type(config), None)
        if kind is not None and kind.__name__ == name:
            return kind
    raise ValueError(f"architectures ({config.architectures}) must name a class of transformers")


def _quantized_class(base: type[nn.Module], options: tuple) -> type[nn.Module]:
    """Returns a subclass for `from_pretrained` whose constructor quantises its experts."""

    class Quantized(base):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            for _, experts in all_experts(self):
                convert(experts, *options)
                # All of their tensors come from the files: none is initialised randomly.
                for part in experts.modules():
                    part._is_hf_initialized = True

    # transformers derives the loss function from the class name.
    Quantized.__name__ = Quantized.__qualname__ = base.__name__
    return Quantized


def _has_foreign_experts(model: nn.Module) -> bool:
    return any(hasattr(experts, "has_gate") for _, experts in all_experts(model))
