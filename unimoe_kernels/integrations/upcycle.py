"""Upcycling of dense transformers models to mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from unimoe_kernels import _checks
from unimoe_kernels.integrations.activations import activation_name
from unimoe_kernels.layers import MoE

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Modes whose scores sum to one for each token: copies of an FFN then compute the same as the FFN.
_MODES = ("topk_softmax", "softmax_topk_renorm", "sigmoid_renorm", "sparsemixer_renorm")
# Options that drop or add expert outputs.
_ANSWERS = ("num_null_experts", "num_shared_experts", "capacity_factor")
RECORD = "unimoe_upcycled"


def upcycle(
    model: nn.Module,
    *,
    num_experts: int,
    top_k: int = 2,
    layers: Iterable[int] | None = None,
    **options,
) -> nn.Module:
    """Replaces the FFNs of a dense LLaMA-like model by `MoE` layers whose experts are copies.

    Before training, outputs are unchanged up to rounding: all experts are identical, and the scores
    of a token sum to one. Supports every model whose FFN is
    `down_proj(act_fn(gate_proj(x)) * up_proj(x))` without biases, such as LLaMA, Mistral, Qwen and
    Gemma. A transformers model can be saved with `save_pretrained` and loaded with `load_upcycled`.

    Args:
        model: the model, changed in place.
        num_experts: E, number of copies of each FFN.
        top_k: K, between 1 and E.
        layers: indices of FFNs, in the order of the model; negative ones count from the end. None
            means all.
        **options: options of `MoE` except bias, activation, device, dtype and router_config (its
            fields are options, too). For example,
            `aux_loss="inject"` and `load_balancing_coef` balance the load in models whose blocks
            return only hidden states.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no such FFN, an FFN has biases or computes something else,
            layers is empty or has an index out of range, `MoE` rejects an option, or an option
            (mode, scale, null or shared experts, a capacity) would change the outputs of the
            model. Nothing is changed in this case.

    Reference:
        Sparse Upcycling, arXiv 2212.05055.
    """
    if options.get("router_config") is not None:
        raise ValueError("router_config is not supported: pass its fields as options")
    mode, scale = options.get("mode", _MODES[0]), options.get("scale", 1.0)
    if mode not in _MODES:
        raise ValueError(f"mode ({mode!r}) must be one of {_MODES}, whose scores add up to one")
    if scale != 1.0:
        raise ValueError(f"scale ({scale}) must be 1.0, so that scores add up to one")
    for name in _ANSWERS:
        if options.get(name):
            raise ValueError(f"{name} ({options[name]}) would change the output of the model")
    # The options are stored in the config, which is saved as JSON.
    options = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }
    ffns = [(name, module) for name, module in model.named_modules() if _is_ffn(module)]
    if not ffns:
        raise ValueError(
            f"model ({type(model).__name__}) has no FFN of {', '.join(_PROJECTIONS)} and act_fn"
        )
    indices = list(range(len(ffns))) if layers is None else _indices(layers, len(ffns))
    for index in indices:
        _check(*ffns[index])
    width = ffns[indices[0]][1].gate_proj.weight.shape
    MoE(width[1], width[0], num_experts, top_k, device="meta", **options)
    for index in indices:
        name, ffn = ffns[index]
        activation = activation_name(ffn.act_fn)
        state = {f"{key}.weight": getattr(ffn, key).weight.detach() for key in _PROJECTIONS}
        moe = MoE.from_ffns([state] * num_experts, top_k, activation=activation, **options)
        model.set_submodule(name, moe.train(ffn.training))
        ffns[index] = (name, None)
    if getattr(model, "config", None) is not None:
        record = {"num_experts": num_experts, "top_k": top_k, "layers": indices, **options}
        setattr(model.config, RECORD, record)
    return model


def load_upcycled(folder: str | Path, **kwargs) -> nn.Module:
    """Loads an upcycled model that `save_pretrained` wrote, like `from_pretrained`.

    Args:
        folder: folder with config.json and safetensors files.
        **kwargs: arguments of `from_pretrained` in transformers, such as `dtype` (default: the
            saved one) and `device_map`.

    Returns:
        The model in evaluation mode, with the generation settings that were saved.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If the folder has no safetensors file.
        ValueError: If its config is not that of an upcycled model, or `output_loading_info` is
            among the arguments.
        RuntimeError: If weights are missing or unexpected.
    """
    import transformers

    if "output_loading_info" in kwargs:
        raise ValueError("output_loading_info is not supported: weights that do not fit are errors")
    if not any(Path(folder).glob("[!.]*.safetensors")):
        raise FileNotFoundError(f"folder ({folder}) has no safetensors file")
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(folder)
    record = getattr(config, RECORD, None)
    if record is None:
        raise ValueError(f"folder ({folder}) has no upcycled model: its config has no {RECORD}")
    dense = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = upcycled_class(dense, record).from_pretrained(
        folder, config=config, output_loading_info=True, **kwargs
    )
    model.__class__ = dense
    if report["missing_keys"] or report["unexpected_keys"]:
        raise RuntimeError(
            f"folder ({folder}): weights are missing ({sorted(report['missing_keys'])}) or left "
            f"over ({sorted(report['unexpected_keys'])})"
        )
    return model


def upcycled_class(dense: type[nn.Module], record: dict) -> type[nn.Module]:
    """Returns a subclass of the dense model for `from_pretrained`, upcycled in its constructor."""

    class Upcycled(dense):
        _keep_in_fp32_modules_strict = (
            *(dense._keep_in_fp32_modules_strict or ()),
            "correction_bias",
        )

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            upcycle(self, **record)

    # transformers derives the loss type from the class name.
    Upcycled.__name__ = Upcycled.__qualname__ = dense.__name__
    return Upcycled


def _is_ffn(module: nn.Module) -> bool:
    return hasattr(module, "act_fn") and all(
        isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS
    )


def _check(name: str, ffn: nn.Module) -> None:
    """Raises ValueError unless `MoE` can replace this FFN."""
    parameters = sorted(key for key, _ in ffn.named_parameters())
    if parameters != sorted(f"{key}.weight" for key in _PROJECTIONS):
        raise ValueError(f"{name} has the parameters {parameters}, it must have three weights only")
    if activation_name(ffn.act_fn) is None:
        raise ValueError(f"{name}.act_fn ({ffn.act_fn!r}) is none of the activations of swiglu")
    for key in parameters:
        _checks.refuse_sharded(f"{name}.{key}", ffn.get_parameter(key))
    if not ffn.gate_proj.weight.is_meta:
        _check_formula(name, ffn)


@torch.no_grad()
def _check_formula(name: str, ffn: nn.Module) -> None:
    """Raises ValueError if an FFN with these parts computes something else, as with a factor."""
    weight = ffn.gate_proj.weight
    x = torch.linspace(-2, 2, 4 * weight.shape[1], device=weight.device).sin()
    x = x.view(1, 4, -1).to(weight.dtype)
    expected = ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)).double()
    if (ffn(x).double() - expected).norm() > 0.02 * expected.norm():
        raise ValueError(
            f"{name} ({type(ffn).__name__}) must compute"
            " down_proj(act_fn(gate_proj(x)) * up_proj(x)); it computes something else"
        )


def _indices(layers: Iterable[int], number: int) -> list[int]:
    layers = list(layers)
    for index in layers:
        if not -number <= index < number:
            raise ValueError(
                f"layers ({layers}): {index} must be between {-number} and {number - 1}"
            )
    if not layers:
        raise ValueError("layers ([]) must name at least one FFN")
    return sorted({index % number for index in layers})
