"""The quantised formats by name, and the options of each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """Storage of the numbers of a quantised weight.

    Attributes:
        dtype: dtype of `values`.
        numbers: how many numbers one element of `values` holds.
        lowest: smallest integer that represents a number, before the zero point is added.
        highest: largest such integer.
        rows: whether a whole output row may share one scale.
        zero_points: whether groups may have zero points.
        group_size: default group size; None for one scale per output row.
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
# bfloat16 has half the bytes of float32 at the same error, since values are rounded to multiples of
# the stored scale. float16 would round the scales of small weights to zero.
SCALE_DTYPES = (torch.float32, torch.bfloat16)
# Added to each "int4" integer when it is stored. Without zero points it is the zero point of every
# group.
INT4_OFFSET = 8


def format_of(name: str) -> Format:
    """Returns a format by name.

    Raises:
        ValueError: If the format is unknown.
    """
    if name not in FORMATS:
        raise ValueError(f"format ({name!r}) must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_options(format: str, group_size: int | None, zero_points: bool) -> None:
    """Checks the options that do not depend on a weight.

    Raises:
        ValueError: If the format is unknown, or does not support the group size or zero points.
        TypeError: If `zero_points` is not a bool.
    """
    found = format_of(format)
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        raise ValueError(f"group_size ({group_size!r}) must be one of {GROUP_SIZES} or None")
    if not isinstance(zero_points, bool):
        raise TypeError(f"zero_points ({zero_points!r}) must be a bool")
    if zero_points and not found.zero_points:
        raise ValueError(f"zero_points ({zero_points}) must be False with format {format!r}")


def group_of(format: str, group_size: int | None, width: int, name: str = "weight") -> int:
    """Returns how many numbers of a row share a scale.

    Args:
        format: name of a format.
        group_size: 32, 64, 128, or None for the default of the format.
        width: numbers in a row.
        name: name of the weight in errors.

    Raises:
        ValueError: If `width` is not a multiple of the group size, or an option is invalid.
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
