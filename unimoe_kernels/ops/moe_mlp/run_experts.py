"""`run_experts`: the experts of any layer, by `moe_mlp` if it supports them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights
from unimoe_kernels.ops.moe_mlp.checks import check_experts, check_quantized_experts
from unimoe_kernels.ops.moe_mlp.op import moe_mlp
from unimoe_kernels.ops.moe_mlp.pipeline import Correction, run_pipeline
from unimoe_kernels.ops.moe_mlp_quantized.op import moe_mlp_quantized
from unimoe_kernels.ops.swiglu.op import swiglu
from unimoe_kernels.quantization.weight import QuantizedWeight

_NAMES = ExpertWeights(*(f"weights.{name}" for name in ExpertWeights._fields))


def run_experts(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    activation: str | Callable[[Tensor], Tensor],
    *,
    correct_first: Correction | None = None,
    correct_down: Correction | None = None,
) -> Tensor:
    """Runs each token through its K experts and sums the results, weighted by score.

    Unlike `moe_mlp`, it also supports experts with any activation, and with a correction of either
    product, such as LoRA or a norm.

    Args:
        x: `[T, D]`, float16, bfloat16, float32 or float64, any strides.
        ids: `[T, K]`, int32 or int64. A choice with a value of E or more is dropped and adds 0.
        scores: `[T, K]`, any floating dtype, used in float32 (float64 for float64 `x`).
        weights: weights of the experts, dtype and device of `x`; both projections may be quantised.
        activation: name of an activation of `swiglu`, or a function that maps pre-activations
            `[N, G]`, in expert order, to `[N, F]`.
        correct_first: None, or a function that maps the product `[N, G]` of the first projection,
            its input `[N, D]` and the expert offsets to a corrected product.
        correct_down: None, or a function that maps the product `[N, D]` of the second projection,
            its input `[N, F]` and the expert offsets to a corrected product.

    Returns:
        `[T, D]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous.

    Raises:
        ValueError: If shapes do not match, devices differ or `activation` is unknown.
        TypeError: If dtypes differ or are not among those above.
    """
    corrected = correct_first is not None or correct_down is not None
    quantized = any(isinstance(weight, QuantizedWeight) for weight in weights[:2])
    if isinstance(activation, str) and not corrected:
        experts = moe_mlp_quantized if quantized else moe_mlp
        return experts(
            x,
            weights.first,
            weights.down,
            ids,
            scores,
            activation=activation,
            gate_up_bias=weights.first_bias,
            down_bias=weights.down_bias,
        )
    x, *cast = _checks.autocast(x, *weights)
    weights = ExpertWeights(*cast)
    check = check_quantized_experts if quantized else check_experts
    check(x, ids, scores, weights, _NAMES, gated=isinstance(activation, str))
    _checks.check_ids(ids)

    def activate(hidden_NG: Tensor) -> Tensor:
        if isinstance(activation, str):
            return swiglu(hidden_NG, activation)
        act_NF = activation(hidden_NG).to(x.dtype).contiguous()
        _checks.check_size(_NAMES.down, weights.down, 2, act_NF.shape[1], "F of the activation")
        return act_NF

    y_TD, _, _ = run_pipeline(
        _backends.call,
        x.contiguous(),
        ids.contiguous(),
        scores.to(_checks.accumulation_dtype(x.dtype)).contiguous(),
        weights,
        activate,
        correct_first,
        correct_down,
    )
    return y_TD
