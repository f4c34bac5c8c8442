"""Floating values from one width to another, rounded once to the nearest, halves to even.

numpy has no bfloat16: it is the upper half of a float32, so every cast goes through float32, which
holds float16 and bfloat16 exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38}
"""What the widths that can be cast to hold at most."""


def cast(data: memoryview, found: str, wanted: str) -> tuple[memoryview, int]:
    """`(the bytes in the dtype wanted, how many finite values became infinite)`.

    `data`: bytes of float values of dtype `found`, "F16", "BF16" or "F32". `wanted`: "F16" or
    "BF16". A NaN stays one of the same sign, an infinity itself; what is too small becomes a
    subnormal number or zero.
    """
    wide = _widen(data, found)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = _to_bfloat16(wide) if wanted == "BF16" else wide.astype(np.float16)
        lost = 0
        if found != "F16":  # which holds nothing that does not fit
            again = _widen(narrow.data.cast("B"), wanted)
            lost = int(np.count_nonzero(np.isinf(again) & np.isfinite(wide)))
    return narrow.data.cast("B"), lost


def _widen(data: memoryview, dtype: str) -> Array:
    """The same values as float32."""
    if dtype == "BF16":
        words = np.frombuffer(data, np.uint16).astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def _to_bfloat16(wide: Array) -> Array:
    """The upper halves, uint16, one more where the lower half is above its middle, or on it and the
    upper one odd.
    """
    words = wide.view(np.uint32)
    rounded = words >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += words
    rounded >>= np.uint32(16)
    quiet = (words >> np.uint32(16)) | np.uint32(0x40)  # rounding a NaN could carry it to infinity
    return np.where(np.isnan(wide), quiet, rounded).astype(np.uint16)
