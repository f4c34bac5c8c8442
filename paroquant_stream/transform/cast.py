"""Cast floating values to another dtype, rounded once to nearest, ties to even.

numpy has no bfloat16: it is the upper half of a float32, so every cast goes through float32, which
holds float16 and bfloat16 exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38}
"""Dtype -> its largest finite value, for the dtypes that can be cast to."""


def cast(data: memoryview, found: str, wanted: str) -> tuple[memoryview, int]:
    """Cast float values and count those that overflow.

    A NaN remains a NaN of the same sign and an infinity remains infinite; a value too small for
    the dtype becomes a subnormal number or zero.

    Args:
        data: The values, little-endian.
        found: Their dtype, "F16", "BF16" or "F32".
        wanted: The dtype to cast to, "F16" or "BF16".

    Returns:
        The cast values, and how many finite values became infinite.
    """
    wide = _widen(data, found)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = to_bfloat16(wide) if wanted == "BF16" else wide.astype(np.float16)
        lost = 0
        if found != "F16":  # every float16 is finite in bfloat16
            again = _widen(narrow.data.cast("B"), wanted)
            lost = int(np.count_nonzero(np.isinf(again) & np.isfinite(wide)))
    return narrow.data.cast("B"), lost


def _widen(data: memoryview, dtype: str) -> Array:
    """Convert to float32, which is exact."""
    if dtype == "BF16":
        words = np.frombuffer(data, np.uint16).astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def to_bfloat16(wide: Array) -> Array:
    """Round float32 to the upper 16 bits, ties to even, as uint16."""
    words = wide.view(np.uint32)
    rounded = words >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += words
    rounded >>= np.uint32(16)
    quiet = (words >> np.uint32(16)) | np.uint32(0x40)  # rounding a NaN could carry it to infinity
    return np.where(np.isnan(wide), quiet, rounded).astype(np.uint16)
