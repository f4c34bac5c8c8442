"""The parameters of a rotation, checked and converted to the tables of a kernel once."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Rounds(NamedTuple):
    """The rounds of a rotation in numpy, from which the tables of every kernel are built."""

    first: NDArray[np.int64]
    """(krot, dims / 2): channel i of each pair, counted inside its group."""
    second: NDArray[np.int64]
    """(krot, dims / 2): channel j of each pair, counted inside its group."""
    cos: NDArray[np.float32]
    """(krot, dims / 2)."""
    sin: NDArray[np.float32]
    """(krot, dims / 2)."""
    channel_scales: NDArray[np.float32]
    """(dims,)."""
    group_size: int

    @classmethod
    def from_parameters(
        cls, theta: mx.array, pairs: mx.array, channel_scales: mx.array, group_size: int
    ) -> Self:
        """Convert the parameters of a layer.

        Args:
            theta: (krot, dims / 2), the angles in radians.
            pairs: int16 (krot, dims): i, j, i, j, ... counted inside the group.
            channel_scales: dims values in any shape.
            group_size: Channels per group.

        Raises:
            ValueError: A round does not pair every channel of a group exactly once. Kernels rotate
                the pairs of a round in parallel, so the result would depend on their order.
        """
        krot, dims = pairs.shape
        local = _numpy(pairs).astype(np.int64)
        groups = local.reshape(krot, -1, group_size)
        complete = (np.sort(groups, axis=-1) == np.arange(group_size)).all(axis=-1)
        if not complete.all():
            k, group = np.argwhere(~complete)[0]
            raise ValueError(
                f"pairs of round {k}, group {group}: expected each of {group_size} channels once"
            )
        angles = _numpy(theta).astype(np.float64)  # float16 cosines would be too coarse
        return cls(
            first=local[:, 0::2],
            second=local[:, 1::2],
            cos=np.cos(angles).astype(np.float32),
            sin=np.sin(angles).astype(np.float32),
            channel_scales=_numpy(channel_scales).astype(np.float32).reshape(dims),
            group_size=group_size,
        )

    @property
    def group_start(self) -> NDArray[np.int64]:
        """Return the first channel of the group of each pair, shape (dims / 2,)."""
        half = self.group_size // 2
        return np.arange(self.first.shape[1]) // half * self.group_size


class KernelTables(Protocol):
    """The tables of a rotation in the arrangement that one kernel reads."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """Build the tables, evaluated: a lazy array could not leave the thread that made it."""

    @property
    def arrays(self) -> list[mx.array]:
        """List all arrays, to count their bytes."""


T = TypeVar("T", bound=KernelTables)


class RotationTables:
    """The tables of one rotation, built for each kernel at its first use and kept.

    Several threads may use it at once: each would build equal tables, and they are stored complete.

    Args:
        theta: (krot, dims / 2), the angles in radians.
        pairs: int16 (krot, dims): i, j, i, j, ... counted inside the group.
        channel_scales: dims values in any shape.
        group_size: Channels per group; even.

    Raises:
        ValueError: The shapes contradict each other, or dims is no multiple of `group_size`.
    """

    def __init__(
        self, theta: mx.array, pairs: mx.array, channel_scales: mx.array, group_size: int
    ) -> None:
        self.krot, self.dims = pairs.shape
        self.group_size = group_size
        if theta.shape != (self.krot, self.dims // 2) or channel_scales.size != self.dims:
            raise ValueError(
                f"theta {theta.shape}, pairs {pairs.shape} and channel_scales "
                f"{channel_scales.shape} do not belong together"
            )
        if group_size % 2 or self.dims % group_size:
            raise ValueError(f"{self.dims} channels do not divide into groups of {group_size}")
        self.build_seconds = 0.0
        self._source = (theta, pairs, channel_scales)
        self._built: dict[type[Any], Any] = {}

    def built_from(self, theta: mx.array, pairs: mx.array, channel_scales: mx.array) -> bool:
        """Return whether the tables were built from these array objects, not from equal ones."""
        source = self._source
        return source[0] is theta and source[1] is pairs and source[2] is channel_scales

    def for_kernel(self, kind: type[T]) -> T:
        """Return the tables of one kernel, built at the first call.

        Args:
            kind: The kernel's own class of tables.

        Raises:
            ValueError: As `Rounds.from_parameters` raises.
        """
        tables: T | None = self._built.get(kind)
        if tables is None:
            start = time.perf_counter()
            tables = kind.build(Rounds.from_parameters(*self._source, self.group_size))
            self.build_seconds += time.perf_counter() - start
            self._built[kind] = tables
        return tables

    @property
    def nbytes(self) -> int:
        """Count the bytes of all tables built so far."""
        return sum(array.nbytes for tables in list(self._built.values()) for array in tables.arrays)


def _numpy(array: mx.array) -> NDArray[Any]:
    """Convert an array to numpy, bfloat16 to float32."""
    if array.dtype == mx.bfloat16:  # numpy has none
        array = array.astype(mx.float32, stream=mx.cpu)
    return np.array(array)
