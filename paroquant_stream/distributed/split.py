"""Which part of a model a load asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Parallel = Literal["pipeline", "tensor"]


@dataclass(frozen=True)
class Split:
    """What is asked for of a model; by default all of it."""

    layers: range | None = None
    """Only these transformer layers."""
    group: Any = None
    """An `mx.distributed.Group`: only what this rank has of a model split over all of its ranks."""
    parallel: Parallel = "pipeline"
    """How the group splits it: by layers, or every layer's tensors."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no model has."""
        if self.layers is not None and self.group is not None:
            raise ValueError("layers and group: a group has its own layers; give one of the two")
        if self.parallel not in get_args(Parallel):
            raise ValueError(f"parallel is pipeline or tensor, not {self.parallel!r}")
        found = self.layers
        if found is not None and not (type(found) is range and found and found.step == 1):
            raise ValueError(f"layers is a range(first, beyond the last), not {found!r}")
        if found is not None and found.start < 0:
            raise ValueError(f"layers start at 0, not {found.start}")

    @property
    def by_tensors(self) -> bool:
        """Whether a part of every layer is asked for."""
        return self.group is not None and self.parallel == "tensor"

    @property
    def by_layers(self) -> bool:
        """Whether some layers are asked for, and others not."""
        return not self.by_tensors and (self.layers is not None or self.group is not None)


WHOLE = Split()
