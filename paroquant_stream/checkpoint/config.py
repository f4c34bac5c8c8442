"""config.json and the index of a model directory."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MalformedFileError
from ..files.strict_json import strict_json
from .model_files import MAX_CONFIG, MAX_JSON, read_inside
from .shard import SHARD_NAME

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPORTED = "paroquant_stream"
"""The key of config.json by which `export` marks the directories that it writes."""


@dataclass(frozen=True)
class ModelConfig:
    """config.json and the index of one model, read once and parsed on first use."""

    directory: Path
    config_text: bytes
    index_text: bytes | None
    """None if the directory has no index."""

    @classmethod
    def read(cls, directory: Path) -> ModelConfig:
        """Read both files.

        Args:
            directory: The model directory.

        Returns:
            Their bytes, not parsed yet.

        Raises:
            CheckpointError: The directory or its config is absent, or a file is too large.
            MalformedFileError: One of the two is not a regular file.
        """
        if not os.path.isdir(directory):
            raise CheckpointError(f"{directory}: no such model directory")
        text = _read_if_present(directory / CONFIG_NAME, MAX_CONFIG)
        if text is None:
            raise CheckpointError(
                f"{directory}: {CONFIG_NAME} is absent; is this a model directory?"
            )
        return cls(directory, text, _read_if_present(directory / INDEX_NAME, MAX_JSON))

    @property
    def path(self) -> Path:
        """Return the path of config.json."""
        return self.directory / CONFIG_NAME

    @cached_property
    def values(self) -> dict[str, Any]:
        """Return the settings in config.json, which callers must not change.

        Raises:
            MalformedFileError: The file is not a JSON object.
        """
        return _parse_object(self.config_text, self.path)

    @cached_property
    def weight_map(self) -> dict[str, str] | None:
        """Return the index's map of tensor names to shard names; None without an index.

        Raises:
            MalformedFileError: The index has no such map, or a value is not a shard's name.
        """
        if self.index_text is None:
            return None
        return _parse_weight_map(self.index_text, self.directory / INDEX_NAME)

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        """Return the sorted names of the model's shards, present or absent."""
        names = (SINGLE_NAME,) if self.weight_map is None else self.weight_map.values()
        return tuple(sorted(set(names)))

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the bytes of config.json and of the index, in hex."""
        digest = hashlib.sha256(self.config_text)
        digest.update(b"\0" if self.index_text is None else b"\1" + self.index_text)
        return digest.hexdigest()

    @property
    def is_export(self) -> bool:
        """Return whether `export` wrote the directory."""
        return EXPORTED in self.values


def _read_if_present(path: Path, limit: int) -> bytes | None:
    try:
        return read_inside(path, limit)
    except FileNotFoundError:
        return None


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    value = strict_json(text, str(path))
    if type(value) is not dict:
        raise MalformedFileError(f"{path}: expected a JSON object")
    return value


def _parse_weight_map(text: bytes, path: Path) -> dict[str, str]:
    weight_map = _parse_object(text, path).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise MalformedFileError(
            f"{path}: expected an object `weight_map` of tensor names to shard names"
        )
    for name in set(map(str, weight_map.values())):
        if not re.fullmatch(SHARD_NAME, name):
            raise MalformedFileError(
                f"{path}: {name[:80]!r} is not a plain name of a .safetensors file"
            )
    if not all(type(name) is str for name in weight_map.values()):
        raise MalformedFileError(f"{path}: weight_map has a value that is not a string")
    return weight_map
