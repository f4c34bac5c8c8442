"""Versions of the entry format, dtypes, and the names of pieces of stacked experts.

A run of consecutive experts in one shard is stored as the piece `<stack>.experts_<first>_<last>`
of shape (last - first + 1, ...). Loading joins the pieces of a stack.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import AssemblyError

_PIECE = r"(?P<stack>.+)\.experts_(?P<first>\d+)_(?P<last>\d+)"  # text: few runs have pieces


def stacks_in_pieces(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of pieces by their stack.

    Args:
        names: Names of stored tensors; those that are not pieces are ignored.

    Returns:
        Stack -> the names of its pieces in the order of the experts.

    Raises:
        AssemblyError: Experts are missing before or between pieces, or in two of them.
    """
    found: dict[str, dict[int, tuple[int, str]]] = defaultdict(dict)
    for name in names:
        if match := re.fullmatch(_PIECE, name):
            found[match["stack"]][int(match["first"])] = (int(match["last"]), name)
    stacks = {}
    for stack, runs in found.items():
        expected = 0
        for first in sorted(runs):
            if first != expected:
                raise AssemblyError(f"{stack}: experts {expected} to {first - 1} are in no entry")
            expected = runs[first][0] + 1
        stacks[stack] = [runs[first][1] for first in sorted(runs)]
    return stacks


ENTRY_FORMAT = 1
OPERATION_VERSIONS = {
    "copy": 1,
    "quantize": 1,
    "awq_weight": 1,
    "awq_biases": 1,
    "group_scales": 1,
    "native_biases": 1,
    "legacy_weight": 1,
    "legacy_scales": 1,
    "legacy_biases": 1,
    "int5_weight": 1,
    "int5_biases": 1,
}
"""A fix of an operation increases its version, and only the entries made with it are rebuilt."""
TRANSFORM = " ".join(
    [f"entry/{ENTRY_FORMAT}", *(f"{k}/{v}" for k, v in OPERATION_VERSIONS.items())]
)
"""All versions in one string; a manifest with another string is checked task by task."""
CAST_VERSION = 1
"""The version of `cast`, separate because entries in the source's dtypes do not depend on it."""

Dtype = Literal["source", "float16", "bfloat16"]
DTYPES: dict[Dtype, str | None] = {"source": None, "float16": "F16", "bfloat16": "BF16"}
"""The values of `--dtype`, and their names in a safetensors header."""
IO_BITS = (4, 8)
"""The values of `--io-bits`; the public loader quantizes embedding and head to 4."""


@dataclass(frozen=True)
class Variant:
    """Which of the conversions of a model: they are kept side by side."""

    dtype: Dtype = "source"
    io_bits: int = 4
    """Bits per weight of embedding and head."""

    @property
    def name(self) -> str:
        """Its name in records and, unless it is the default, in listings."""
        return self.dtype if self.io_bits == 4 else f"{self.dtype}, io-bits {self.io_bits}"

    @property
    def options(self) -> str:
        """The options of `convert` that make it, each with a space before it."""
        dtype = "" if self.dtype == "source" else f" --dtype {self.dtype}"
        return dtype + ("" if self.io_bits == 4 else f" --io-bits {self.io_bits}")

    @property
    def how_asked(self) -> str:
        """How a user asks for it, in messages: by options of a command, or arguments of `load`."""
        given = {"dtype": self.dtype, "io_bits": self.io_bits}
        changed = {name: given[name] for name in given if given[name] not in ("source", 4)}
        arguments = (f"{k}={v!r}" for k, v in (changed or {"dtype": "source"}).items())
        return f"{self.options.lstrip() or '--dtype source'} (in Python {', '.join(arguments)})"


DEFAULT_VARIANT = Variant()
VARIANTS = {v.name: v for v in (Variant(dtype, bits) for dtype in DTYPES for bits in IO_BITS)}
