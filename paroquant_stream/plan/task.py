"""Parts, operations and tasks: what one shard makes, and the key of its entry.

An entry's key is a SHA-256 over everything that decides its bytes: the format, the shard's SHA-256,
the bytes borrowed from other shards, and the task's canonical description. No file name and no path
is in it, so moving, copying or renaming a model reconverts nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..files.tensor_header import TensorSpec
from ..store.format import CAST_VERSION, ENTRY_FORMAT, OPERATION_VERSIONS

_FLOATS = ("F16", "BF16", "F32")
_KEPT = (
    "theta",  # makes the rotation's tables, which are float32 whatever the activations are
    "channel_scales",
    "A_log",  # from here on: float32 arithmetic, which cast_predicate of mlx-lm's classes exempts
    "dt_bias",
    "expert_bias",
    "e_score_correction_bias",
    "router_bias",
)


@dataclass(frozen=True, slots=True)
class Part(TensorSpec):
    """A source tensor: the absolute byte range `start:stop` of a shard."""

    shard: str
    start: int
    stop: int


@dataclass(frozen=True)
class Operation:
    """How some parts become one output, or the three of a quantized embedding."""

    kind: str
    """A key of `OPERATION_VERSIONS`."""
    slices: tuple[tuple[Part, ...], ...]
    """For each slice of the outputs' first axis its parts, the owned one first. A stack of experts
    has one slice an expert; anything else has one.
    """
    outputs: tuple[TensorSpec, ...]
    values: tuple[tuple[str, int], ...] = ()
    """Numbers from the config or a foreign header that the result depends on."""
    made: tuple[str, ...] = ()
    """The dtypes that the kind itself gives, where outputs are cast from them; else nothing."""

    def cast_to(self, dtype: str) -> Operation:
        """Return the same operation with its floating outputs in `dtype`, "F16" or "BF16".

        Outputs whose width is not free, like theta, keep theirs.
        """
        outputs = tuple(
            TensorSpec(output.name, dtype, output.shape)
            if output.dtype in _FLOATS and not output.name.endswith(_KEPT)
            else output
            for output in self.outputs
        )
        if outputs == self.outputs:
            return self
        return replace(self, outputs=outputs, made=tuple(output.dtype for output in self.outputs))

    @property
    def parts(self) -> Iterator[Part]:
        """Every part, slice after slice."""
        return (part for parts in self.slices for part in parts)

    @property
    def size(self) -> int:
        """Return the bytes that it reads."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def start(self) -> int:
        """The offset in the shard at which all of its first slice has begun.

        The safetensors library saves by falling item size, so an AutoAWQ zero point lies gigabytes
        before its scales: at the zeros' turn the shard would be hashed up to the scales and read
        twice.
        """
        owned = self.slices[0][0].shard
        return max(part.start for part in self.slices[0] if part.shard == owned)


@dataclass(frozen=True)
class Task:
    """The work for one shard."""

    shard: str
    size: int
    """Bytes of the shard."""
    operations: tuple[Operation, ...]
    """In the order in which a reading of the shard from front to back meets what they need."""
    header_sha256: bytes = b""
    """Of the header that was planned."""

    @property
    def outputs(self) -> list[TensorSpec]:
        """Every tensor of the entry, in the order of the operations."""
        return [output for operation in self.operations for output in operation.outputs]

    @property
    def owned(self) -> Iterator[Part]:
        """The parts that lie in its own shard, as often as operations read them."""
        parts = (part for operation in self.operations for part in operation.parts)
        return (part for part in parts if part.shard == self.shard)

    @cached_property
    def borrowed(self) -> dict[str, tuple[Part, ...]]:
        """The parts that lie in other shards, by shard, in the order of first use."""
        lenders: dict[str, dict[str, Part]] = {}
        for operation in self.operations:
            for part in operation.parts:
                if part.shard != self.shard:
                    lenders.setdefault(part.shard, {})[part.name] = part
        return {shard: tuple(parts.values()) for shard, parts in lenders.items()}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the description: operations with versions, outputs, parts, values, casts."""
        place = {shard: index for index, shard in enumerate((self.shard, *self.borrowed))}

        def describe(operation: Operation) -> list[Any]:
            slices = [
                [[place[p.shard], p.name, p.dtype, p.shape] for p in parts]
                for parts in operation.slices
            ]
            outputs = [[o.name, o.dtype, o.shape] for o in operation.outputs]
            version = OPERATION_VERSIONS[operation.kind]
            cast = [["cast", CAST_VERSION, operation.made]] if operation.made else []
            return [operation.kind, version, slices, outputs, operation.values, *cast]

        return _sha256_of([describe(operation) for operation in self.operations])

    def borrowed_sha256(self, part_digests: Mapping[str, bytes]) -> list[str]:
        """Hash what is borrowed: a SHA-256 per lending shard over that of each part, in order.

        Hashing digests instead of bytes lets the parts be read in any order.

        Args:
            part_digests: SHA-256 of every borrowed part's bytes, by tensor name.
        """
        return [
            hashlib.sha256(b"".join(part_digests[part.name] for part in parts)).hexdigest()
            for parts in self.borrowed.values()
        ]

    def key(self, source_sha256: str, borrowed_sha256: list[str]) -> str:
        """Return the entry's key, 64 hex digits.

        Args:
            source_sha256: Of the shard.
            borrowed_sha256: As `Task.borrowed_sha256` returns it.
        """
        return _sha256_of([ENTRY_FORMAT, source_sha256, borrowed_sha256, self.sha256])


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
