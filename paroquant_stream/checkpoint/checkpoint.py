"""The source model directory: its config, its index, its shards and their headers.

`model.safetensors.index.json` decides which files are shards; without it, exactly
`model.safetensors`. Nothing is ever found by a glob: a stray file would change the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..files.tensor_header import Header
from .config import INDEX_NAME, SINGLE_NAME, ModelConfig
from .shard import Shard


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its config and the shards in the order of their names."""

    config: ModelConfig
    shards: tuple[Shard, ...]
    given: Mapping[str, Header] = field(default_factory=dict)
    """Headers of shards that the directory lacks, from the Hub or from before they were dropped."""

    @property
    def directory(self) -> Path:
        """The model directory."""
        return self.config.directory

    def headers(self) -> dict[str, Header]:
        """Every shard's header by shard name, checked against the index.

        Raises CheckpointError listing each tensor that the index and the headers do not agree on,
        and each tensor that two shards hold.
        """
        headers = {s.name: self.given.get(s.name) or s.header() for s in self.shards}
        issues: list[str] = []
        home: dict[str, str] = {}
        for name, header in headers.items():
            for tensor in header.tensors:
                if tensor.name in home:
                    issues.append(
                        f"{tensor.name}: lies in two shards, {home[tensor.name]} and {name}"
                    )
                home[tensor.name] = name
        for tensor_name, name in (self.config.weight_map or home).items():
            if home.get(tensor_name) != name:
                found = home.get(tensor_name, "no shard")
                issues.append(f"{tensor_name}: the index says {name}, it lies in {found}")
        if self.config.weight_map is not None:
            issues += [f"{t}: lies in {n}, the index does not name it" for t, n in home.items()
                       if t not in self.config.weight_map]  # fmt: skip
        if issues:
            raise CheckpointError(
                f"{self.directory}: index and shards disagree:\n  " + "\n  ".join(issues)
            )
        return headers


def open_checkpoint(
    config: ModelConfig, may_lack: Callable[[str], bool] = lambda _: False
) -> Checkpoint:
    """Open a checkpoint; reads no shard.

    Args:
        config: Of its directory.
        may_lack: Whether the directory may lack the shard of a name.

    Raises:
        CheckpointError: A shard is absent that must be there.
        MalformedFileError: The config or the index is malformed.
    """
    directory, _ = config.directory, config.values  # a malformed config is told first
    shards = tuple(Shard(name, directory / name) for name in config.shard_names)
    absent = [s.name for s in shards if not os.path.lexists(s.path) and not may_lack(s.name)]
    if absent and config.weight_map is None:
        raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME} is there")
    if absent:
        raise CheckpointError(
            f"{directory}: the index names absent shards: {', '.join(absent)}; download them"
        )
    return Checkpoint(config, shards)
