"""Which part of a model a caller of `load` requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Parallel = Literal["pipeline", "tensor"]


@dataclass(frozen=True)
class Split:
    """The requested part of a model; by default all of it."""

    layers: range | None = None
    """Only these transformer layers, numbered from 0."""
    group: Any = None
    """An `mx.distributed.Group`: only the part of this rank, of a model split over its ranks."""
    parallel: Parallel = "pipeline"
    """How the group splits the model: by layers, or the tensors of every layer."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: No model has such a part.
        """
        if self.layers is not None and self.group is not None:
            raise ValueError(
                "layers and group: a group chooses its layers; pass only one of the two"
            )
        if self.parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be pipeline or tensor, not {self.parallel!r}")
        found = self.layers
        if found is not None and not (type(found) is range and found and found.step == 1):
            raise ValueError(f"layers must be a range(first, last + 1), not {found!r}")
        if found is not None and found.start < 0:
            raise ValueError(f"layers start at 0, not at {found.start}")

    @property
    def by_tensors(self) -> bool:
        """Whether a part of every layer is requested."""
        return self.group is not None and self.parallel == "tensor"

    @property
    def by_layers(self) -> bool:
        """Whether only some of the layers are requested."""
        return not self.by_tensors and (self.layers is not None or self.group is not None)


WHOLE = Split()
