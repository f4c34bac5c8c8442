"""A model directory: its config, its shards and their headers.

`model.safetensors.index.json` lists the shards; without an index the only shard is
`model.safetensors`. Files are never found by a glob, since a stray file would change the model.
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
    """The config of a model directory and its shards, sorted by name."""

    config: ModelConfig
    shards: tuple[Shard, ...]
    known_headers: Mapping[str, Header] = field(default_factory=dict)
    """Headers of absent shards, read from the Hub or kept when the shards were removed."""

    @property
    def directory(self) -> Path:
        """Return the model directory."""
        return self.config.directory

    def headers(self) -> dict[str, Header]:
        """Read the headers of all shards and check them against the index.

        Returns:
            Shard name -> its header.

        Raises:
            CheckpointError: The index and the headers disagree or a tensor is in two shards; lists
                every such tensor. Or a shard cannot be opened.
            MalformedFileError: A shard is not a valid safetensors file.
        """
        headers = {s.name: self.known_headers.get(s.name) or s.header() for s in self.shards}
        issues: list[str] = []
        shard_of: dict[str, str] = {}
        for name, header in headers.items():
            for tensor in header.tensors:
                if tensor.name in shard_of:
                    issues.append(
                        f"{tensor.name}: in two shards, {shard_of[tensor.name]} and {name}"
                    )
                shard_of[tensor.name] = name
        weight_map = self.config.weight_map
        for tensor_name, name in (weight_map or shard_of).items():
            if shard_of.get(tensor_name) != name:
                found = shard_of.get(tensor_name, "no shard")
                issues.append(f"{tensor_name}: expected in {name} by the index, found in {found}")
        if weight_map is not None:
            unnamed = ((t, n) for t, n in shard_of.items() if t not in weight_map)
            issues += [f"{tensor}: in {name}, missing in the index" for tensor, name in unnamed]
        if issues:
            raise CheckpointError(
                f"{self.directory}: index and shards disagree:\n  " + "\n  ".join(issues)
            )
        return headers


def open_checkpoint(
    config: ModelConfig, may_lack: Callable[[str], bool] = lambda _: False
) -> Checkpoint:
    """List the shards of a model directory without opening them.

    Args:
        config: The config of the directory.
        may_lack: Returns whether the shard of this name may be absent.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: A required shard is absent.
        MalformedFileError: The config or the index is malformed.
    """
    directory, _ = config.directory, config.values  # a malformed config is reported first
    shards = tuple(Shard(name, directory / name) for name in config.shard_names)
    absent = [s.name for s in shards if not os.path.lexists(s.path) and not may_lack(s.name)]
    if absent and config.weight_map is None:
        raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME} exists")
    if absent:
        raise CheckpointError(
            f"{directory}: the index names absent shards: {', '.join(absent)}; download them"
        )
    return Checkpoint(config, shards)
