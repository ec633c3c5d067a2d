"""Rounding of weights that minimises the change of the outputs, rather than of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe_kernels.quantization.formats import FORMATS, INT4_OFFSET
from unimoe_kernels.quantization.rounding import (
    pack_int4,
    quantize_weight,
    round_to_scales,
)
from unimoe_kernels.quantization.weight import QuantizedWeight

# Within a block of columns, errors are propagated column by column; to the columns after the
# block, by one matmul.
_BLOCK = 128
# Added to the diagonal of the second moments, relative to its mean. Multiplied by 10 until they are
# positive definite in float32.
_DAMPING = 0.01
# Clipping a group's largest magnitude often causes less error than a coarser step for the others.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def quantize_weight_by_inputs(
    weight: Tensor,
    moments: Tensor,
    counts: Sequence[int],
    format: str,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantises a stacked weight so that its products with given inputs change least.

    The scale of each group is chosen first: of several candidates, the one with the least error,
    weighted by the mean square of each input. Columns are then rounded in descending order of that
    mean square. The error of each column is compensated in the columns that are not rounded yet,
    according to the second moments of the inputs. The formats, and the speed of the result, are
    those of `quantize_weight`.

    Args:
        weight: `[E, out, in]`, as for `quantize_weight`.
        moments: `[E, in, in]` float32: sum of the outer products of each expert's inputs.
        counts: number of inputs of each expert. With few of them, correlations between inputs are
            trusted less.
        format: as for `quantize_weight`.
        group_size: likewise.
        zero_points: likewise.
        name: name of the weight in errors.

    Returns:
        The quantised weight, in new memory.

    Raises:
        ValueError: As `quantize_weight`.
        TypeError: Likewise.

    Reference:
        GPTQ, arXiv 2210.17323, with activation order, scales fixed beforehand, and correlations
        shrunk as in arXiv 0907.4698.
    """
    nearest = quantize_weight(weight, format, group_size, zero_points=zero_points, name=name)
    if weight.is_meta:
        return nearest
    group = nearest.group_size
    exact_EOI = weight.detach().float()
    diagonal_EI = moments.diagonal(dim1=1, dim2=2)
    importance_EI = torch.where(diagonal_EI > 0, diagonal_EI, diagonal_EI.new_ones(()))
    scales_EOG = _best_scales(exact_EOI, importance_EI, nearest)
    order_EI = diagonal_EI.sort(dim=1, descending=True, stable=True).indices
    factor_EII = _inverse_factor(_shrunk(moments, counts), order_EI)
    integers_EOI = _round_in_order(exact_EOI, scales_EOG, nearest, order_EI, factor_EII, group)
    integers_EOI = integers_EOI.to(FORMATS[format].dtype)
    values = pack_int4(integers_EOI) if format == "int4" else integers_EOI
    return nearest._replace(values=values, scales=scales_EOG)


def _best_scales(exact_EOI: Tensor, importance_EI: Tensor, nearest: QuantizedWeight) -> Tensor:
    groups = (nearest.scales.shape[-1], nearest.group_size)
    grouped_EOGI = exact_EOI.unflatten(-1, groups)
    importance_EOGI = importance_EI.unsqueeze(1).unflatten(-1, groups)
    best, least = nearest.scales, None
    for shrink in _SHRINK:
        scales = (nearest.scales.float() * shrink).to(nearest.scales.dtype)
        integers = round_to_scales(grouped_EOGI, scales, nearest.zeros, nearest.format)
        wide = scales.float().unsqueeze(-1)
        zeros = _zero(nearest.zeros, nearest.format)
        zeros = zeros.unsqueeze(-1) if isinstance(zeros, Tensor) else zeros
        error = (integers - zeros).mul_(wide).sub_(grouped_EOGI)
        error = error.square_().mul_(importance_EOGI).sum(-1)
        if least is None:
            least = error
        else:
            better = error < least
            best, least = torch.where(better, scales, best), torch.minimum(error, least)
    return best


def _shrunk(moments: Tensor, counts: Sequence[int]) -> Tensor:
    """Shrinks correlations towards 0, the more so the fewer inputs they were estimated from.

    Oracle approximating shrinkage of the correlation matrix (arXiv 0907.4698). Without it, a few
    hundred uncorrelated inputs of width 576 raise the error on other inputs to 1.6 times that of
    rounding to nearest.
    """
    size = moments.shape[-1]
    deviation_EI = moments.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse_EI = torch.where(deviation_EI > 0, 1 / deviation_EI, torch.zeros_like(deviation_EI))
    correlation_EII = moments * inverse_EI.unsqueeze(1) * inverse_EI.unsqueeze(2)
    squares_E = correlation_EII.square().sum((1, 2)).double()
    count_E = torch.tensor(counts, dtype=torch.float64, device=moments.device)
    over_E = (count_E + 1 - 2 / size) * (squares_E - size).clamp(min=1e-6)
    share_E = (((1 - 2 / size) * squares_E + size**2) / over_E).clamp(max=1).float()
    kept_EII = (1 - share_E)[:, None, None] * moments
    return kept_EII + torch.diag_embed(share_E[:, None] * deviation_EI.square())


def _zero(zeros: Tensor | None, format: str) -> Tensor | int:
    if zeros is not None:
        return zeros.float()
    return INT4_OFFSET if format == "int4" else 0


def _inverse_factor(moments: Tensor, order_EI: Tensor) -> Tensor:
    """Returns upper triangular U; `U^T U` is the inverse of the damped moments in `order_EI`."""
    size = moments.shape[-1]
    index = order_EI.unsqueeze(2).expand(-1, -1, size)
    ordered = moments.gather(1, index).gather(2, index.transpose(1, 2))
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    # Inputs that are always zero get a nonzero diagonal, and propagate no error.
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, mean.new_ones(()))
    damping = _DAMPING
    while True:
        damped = ordered + torch.diag_embed(damping * mean.expand_as(diagonal))
        # With rows and columns reversed, the factor of the moments is upper triangular, and its
        # inverse is U.
        lower, info = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not info.any():
            break
        damping *= 10
    unit = torch.eye(size, device=moments.device).expand_as(ordered)
    return torch.linalg.solve_triangular(lower.flip(1, 2), unit, upper=True)


def _round_in_order(
    exact_EOI: Tensor,
    scales_EOG: Tensor,
    nearest: QuantizedWeight,
    order_EI: Tensor,
    factor_EII: Tensor,
    group: int,
) -> Tensor:
    """Returns the stored integers, `[E, out, in]` float32, in the column order of the weight."""
    rows, width = exact_EOI.shape[1:]
    index = order_EI.unsqueeze(1).expand(-1, rows, -1)
    # Columns are the first dimension: each is read and written as a whole.
    left = exact_EOI.gather(2, index).permute(2, 0, 1).contiguous()
    group_of = (order_EI // group).unsqueeze(1).expand(-1, rows, -1)
    scales = scales_EOG.gather(2, group_of).permute(2, 0, 1).contiguous()
    zeros = nearest.zeros
    zeros = None if zeros is None else zeros.gather(2, group_of).permute(2, 0, 1).contiguous()
    integers = torch.empty_like(left)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = []
        for column in range(start, end):
            zero = None if zeros is None else zeros[column]
            integers[column] = round_to_scales(
                left[column].unsqueeze(-1), scales[column], zero, nearest.format
            ).squeeze(-1)
            offset = _zero(zero, nearest.format)
            rounded = (integers[column] - offset) * scales[column].float()
            error = (left[column] - rounded) / factor_EII[:, column, column].unsqueeze(1)
            errors.append(error)
            rest = factor_EII[:, column, column + 1 : end].t()
            left[column + 1 : end].sub_(rest.unsqueeze(-1) * error)
        if end < width:
            carried = torch.bmm(
                factor_EII[:, start:end, end:].transpose(1, 2), torch.stack(errors, 1)
            )
            left[end:].sub_(carried.transpose(0, 1))
    result = torch.empty_like(exact_EOI)
    return result.scatter_(2, index, integers.permute(1, 2, 0))
