"""Which model is meant: its directory, and where shards come from that the directory lacks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .config import ModelConfig
from .shard import Shard

if TYPE_CHECKING:
    from .prefetch import Remote


@dataclass(frozen=True)
class ModelSource:
    """A model as the user named it, and as it was found."""

    name: str
    """As the user named it: a path or a repository id."""
    directory: Path
    remote: Remote | None = None
    """Where shards come from that the directory lacks."""

    @cached_property
    def config(self) -> ModelConfig:
        """config.json and the index, read when first used.

        Raises:
            CheckpointError: The directory or its config is absent.
        """
        return ModelConfig.read(self.directory)

    @cached_property
    def resolved(self) -> Path:
        """The directory without links."""
        return self.directory.resolve()

    def shard(self, name: str) -> Shard:
        """Give the shard of this name, which may be absent."""
        return Shard(name, self.directory / name)

    def has_shard(self, name: str) -> bool:
        """Tell whether the shard of this name is there."""
        return os.path.exists(self.directory / name)
