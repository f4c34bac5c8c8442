"""A rotation's parameters, checked and turned into the tables of a kernel, once per module."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rounds:
    """The rounds of a rotation in numpy: what every form of tables is made from."""

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
    def read(
        cls, theta: mx.array, pairs: mx.array, channel_scales: mx.array, group_size: int
    ) -> Self:
        """The rounds of a module's parameters; raises ValueError unless each is a perfect matching.

        A round that names a channel twice would leave the result to the order of the pairs, and
        kernels turn the pairs of a round in parallel.
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
        angles = _numpy(theta).astype(np.float64)  # float16 cosines would cost 2e-4 of accuracy
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
        """(dims / 2,): the first channel of the group that each pair lies in."""
        half = self.group_size // 2
        return np.arange(self.first.shape[1]) // half * self.group_size


class TableForm(Protocol):
    """The tables of one kernel, as it wants them."""

    @classmethod
    def build(cls, rounds: Rounds) -> Self:
        """These tables, evaluated: a lazy array could not leave the thread that made it."""

    @property
    def arrays(self) -> list[mx.array]:
        """All of its arrays, to count their bytes."""


F = TypeVar("F", bound=TableForm)


class RotationTables:
    """The tables of one rotation, each kernel's form built at its first use and kept.

    `theta` is (krot, dims / 2), `pairs` int16 (krot, dims) with i, j, i, j, ... local to the group,
    `channel_scales` holds dims values in any shape. Raises ValueError where these disagree. Several
    threads may use it at once: forms are equal whoever builds them, and are stored complete.
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
        self._forms: dict[type[Any], Any] = {}

    def built_from(self, theta: mx.array, pairs: mx.array, channel_scales: mx.array) -> bool:
        """Whether these very arrays are the ones the tables were made from."""
        mine = self._source
        return mine[0] is theta and mine[1] is pairs and mine[2] is channel_scales

    def form(self, kind: type[F]) -> F:
        """The tables as `kind`; raises ValueError when the pairs are no perfect matchings."""
        form: F | None = self._forms.get(kind)
        if form is None:
            start = time.perf_counter()
            form = kind.build(Rounds.read(*self._source, self.group_size))
            self.build_seconds += time.perf_counter() - start
            self._forms[kind] = form
        return form

    @property
    def nbytes(self) -> int:
        """Bytes of all forms built so far."""
        return sum(array.nbytes for form in list(self._forms.values()) for array in form.arrays)


def _numpy(array: mx.array) -> NDArray[Any]:
    if array.dtype == mx.bfloat16:  # numpy has none
        array = array.astype(mx.float32, stream=mx.cpu)
    return np.array(array)
