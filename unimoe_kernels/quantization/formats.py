"""The formats by name, and what each one allows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """How one number of a weight is stored.

    Attributes:
        dtype: of `values`.
        numbers: how many numbers one element of `values` holds.
        lowest: the smallest integer that stands for a number, before its zero point.
        highest: the largest.
        rows: whether one scale may serve a whole output row.
        zero_points: whether groups may have zero points.
        group_size: the default; None for one scale an output row.
    """

    dtype: torch.dtype
    numbers: int
    lowest: int
    highest: int
    rows: bool
    zero_points: bool
    group_size: int | None


# -128 is not used, so that the range is symmetric.
FORMATS = {
    "int8": Format(torch.int8, 1, -127, 127, rows=True, zero_points=False, group_size=None),
    "int4": Format(torch.uint8, 2, -8, 7, rows=False, zero_points=True, group_size=64),
}
GROUP_SIZES = (32, 64, 128)
# Half the bytes of float32 at the same error: values are rounded to multiples of the scale as it
# is stored. float16 would round the scales of small weights to zero.
SCALE_DTYPES = (torch.float32, torch.bfloat16)
# A number of "int4" is stored plus this. Without zero points it is every group's zero point.
INT4_OFFSET = 8


def format_of(name: str) -> Format:
    """Returns a format by name.

    Raises:
        ValueError: If there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"format ({name!r}) must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_options(format: str, group_size: int | None, zero_points: bool) -> None:
    """Checks what can be checked without a weight.

    Raises:
        ValueError: If the format is unknown, or has no such groups or no zero points.
    """
    found = format_of(format)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size ({group_size}) must be one of {GROUP_SIZES} or None")
    if zero_points and not found.zero_points:
        raise ValueError(f"zero_points ({zero_points}) must be False with format {format!r}")


def group_of(format: str, group_size: int | None, width: int, name: str = "weight") -> int:
    """Returns how many numbers of a row of `width` share a scale.

    Args:
        format: name of a format.
        group_size: 32, 64, 128, or None for the default of the format.
        width: numbers in a row.
        name: of the weight, for the error.

    Raises:
        ValueError: If width is no multiple of the group, or the options are wrong.
    """
    check_options(format, group_size, False)
    group_size = group_size or FORMATS[format].group_size
    if group_size is None:
        return width
    if width % group_size:
        raise ValueError(
            f"{name} has rows of {width} numbers, which must be a multiple of group_size "
            f"({group_size})"
        )
    return group_size
