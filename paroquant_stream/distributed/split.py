"""Which part of a model a caller of `load` requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..options import check, check_choice

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
        check_choice("parallel", self.parallel, get_args(Parallel))
        found, members = self.layers, ("rank", "size")
        fits = found is None or bool(type(found) is range and found and found.step == 1)
        check("layers", found, "a range(first, last + 1) or None", fits)
        fits = self.group is None or all(callable(getattr(self.group, m, None)) for m in members)
        check("group", self.group, "an mx.distributed.Group or None", fits)
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
