"""The model that a user named: its directory, and the remote of its absent shards."""

from __future__ import annotations

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
    """The name, directory and remote of a model."""

    name: str
    """As the user named it: a path or a repository id."""
    directory: Path
    remote: Remote | None = None
    """Where absent shards are downloaded from; None for a local model."""

    @cached_property
    def config(self) -> ModelConfig:
        """Return config.json and the index, read on first use.

        Raises:
            CheckpointError: The directory or its config is absent.
            MalformedFileError: One of the files is not a regular file.
        """
        return ModelConfig.read(self.directory)

    @cached_property
    def resolved(self) -> Path:
        """Return the directory's path with all links resolved."""
        return self.directory.resolve()

    def shard(self, name: str) -> Shard:
        """Return the shard of this name, which may be absent."""
        return Shard(name, self.directory / name)
