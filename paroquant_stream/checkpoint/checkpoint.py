"""The source model directory: its config, its index, its shards and their headers.

`model.safetensors.index.json` decides which files are shards; without it, exactly
`model.safetensors`. Nothing is ever found by a glob: a stray file would change the model.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MalformedFile
from ..files.descriptor import closing
from ..files.digest_cache import Memo, hash_file
from ..files.strict_json import strict_json
from ..files.tensor_header import Header, TensorInfo, read_header
from .model_files import MAX_CONFIG, MAX_JSON, hub_blob, open_inside, read_inside

__all__ = ["Checkpoint", "Shard", "TensorInfo", "hub_blob", "open_checkpoint"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPORTED = "paroquant_stream"
"""The key of config.json by which a directory that `export` wrote is known."""
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}\.safetensors")
"""What an index may name: nothing that leads out of the directory."""


@dataclass(frozen=True)
class Shard:
    """One `.safetensors` file of a checkpoint."""

    name: str
    path: Path

    def open(self) -> int:
        """A descriptor of the shard's bytes.

        A symlink is followed only inside the model directory or to a blob of its own repository in
        the Hub's cache. Raises CheckpointError when the file is absent or the link leads elsewhere.
        """
        try:
            return open_inside(self.path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: the shard is absent; download it again") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error

    def header(self) -> Header:
        """The validated header. Raises CheckpointError or MalformedFile."""
        with closing(self.open()) as fd:
            return read_header(fd, str(self.path))

    def sha256(self, memo: Memo) -> str:
        """SHA-256 of the whole shard, read now and remembered."""
        with closing(self.open()) as fd:
            return hash_file(fd, str(self.path), memo, self.hub_sha256)

    def known_sha256(self, memo: Memo, fd: int | None = None) -> str | None:
        """SHA-256 of the whole shard, if that is known without reading it through.

        What the Hub's cache names it by is not enough: see `Memo.lookup`.

        Args:
            memo: Of what was hashed before.
            fd: The shard, if it is open.

        Raises:
            CheckpointError: It is absent or cannot be opened.
            MalformedFile: It is no regular file.
        """
        if fd is None:
            with closing(self.open()) as opened:
                return self.known_sha256(memo, opened)
        return memo.lookup(fd, self.hub_sha256)

    @property
    def hub_sha256(self) -> str | None:
        """The SHA-256 that the Hub's cache gives in the blob's name, if it is one.

        Exactly one hop: since huggingface_hub PR 4498 the blob may itself be a link to a Xet hash,
        which is 64 hex digits too and no SHA-256. It is the server's claim about the file that it
        sent, so no identity of what lies there now.
        """
        blob = hub_blob(self.path)
        return blob.name if blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: parsed config, the shards in the order of their names."""

    directory: Path
    config: dict[str, Any]
    weight_map: dict[str, str] | None
    """Tensor name -> shard name as the index gives it; None without an index."""
    shards: tuple[Shard, ...]
    config_sha256: str
    """SHA-256 of the bytes of config.json and of the index."""

    given: Mapping[str, Header] = field(default_factory=dict)
    """Headers of shards that the directory lacks, from the Hub or from before they were dropped."""

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
        for tensor_name, name in (self.weight_map or home).items():
            if home.get(tensor_name) != name:
                found = home.get(tensor_name, "no shard")
                issues.append(f"{tensor_name}: the index says {name}, it lies in {found}")
        if self.weight_map is not None:
            issues += [f"{t}: lies in {n}, the index does not name it" for t, n in home.items()
                       if t not in self.weight_map]  # fmt: skip
        if issues:
            raise CheckpointError(
                f"{self.directory}: index and shards disagree:\n  " + "\n  ".join(issues)
            )
        return headers


def config_digest(directory: Path) -> str:
    """SHA-256 of the bytes of config.json and, if there is one, of the index.

    Raises CheckpointError when the directory or its config is absent.
    """
    return _digest(*_read_texts(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError when it is absent or no JSON object."""
    return _parse_object(_read_texts(directory)[0], directory / "config.json")


def shard_names(directory: Path) -> list[str]:
    """The names of the shards that the directory has or should have, sorted; reads the index alone.

    Raises CheckpointError or MalformedFile when it cannot be read.
    """
    index_text = _read_text(directory / INDEX_NAME, MAX_JSON)
    if index_text is None:
        return [SINGLE_NAME]
    return sorted(set(_parse_index(index_text, directory / INDEX_NAME).values()))


def open_checkpoint(
    directory: Path, may_lack: Callable[[str], bool] = lambda _: False
) -> Checkpoint:
    """The checkpoint in `directory`; reads config and index, no shard.

    Raises CheckpointError for a missing or malformed config or index and for a shard that is
    absent, unless it is one that the directory `may_lack`.
    """
    config_text, index_text = _read_texts(directory)
    config = _parse_object(config_text, directory / "config.json")
    if index_text is None:
        weight_map, names = None, [SINGLE_NAME]
        if not os.path.exists(directory / SINGLE_NAME) and not may_lack(SINGLE_NAME):
            raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME} is there")
    else:
        weight_map = _parse_index(index_text, directory / INDEX_NAME)
        names = sorted(set(weight_map.values()))
    shards = tuple(Shard(name, directory / name) for name in names)
    absent = [s.name for s in shards if not os.path.lexists(s.path) and not may_lack(s.name)]
    if absent:
        raise CheckpointError(
            f"{directory}: the index names absent shards: {', '.join(absent)}; download them"
        )
    return Checkpoint(directory, config, weight_map, shards, _digest(config_text, index_text))


def _digest(config_text: bytes, index_text: bytes | None) -> str:
    digest = hashlib.sha256(config_text)
    digest.update(b"\0" if index_text is None else b"\1" + index_text)
    return digest.hexdigest()


def _read_texts(directory: Path) -> tuple[bytes, bytes | None]:
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: no such model directory")
    config_text = _read_text(directory / "config.json", MAX_CONFIG)
    if config_text is None:
        raise CheckpointError(f"{directory}: config.json is absent; is this a model directory?")
    return config_text, _read_text(directory / INDEX_NAME, MAX_JSON)


def _read_text(path: Path, limit: int) -> bytes | None:
    try:
        return read_inside(path, limit)
    except FileNotFoundError:
        return None


def _parse_object(text: bytes, path: Path) -> dict[str, Any]:
    value = strict_json(text, str(path))
    if type(value) is not dict:
        raise MalformedFile(f"{path}: expected a JSON object")
    return value


def _parse_index(text: bytes, path: Path) -> dict[str, str]:
    weight_map = _parse_object(text, path).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise MalformedFile(
            f"{path}: expected an object `weight_map` of tensor names to shard names"
        )
    for name in set(map(str, weight_map.values())):
        if not SHARD_NAME.fullmatch(name):
            raise MalformedFile(f"{path}: {name[:80]!r} is no plain name of a .safetensors file")
    if not all(type(name) is str for name in weight_map.values()):
        raise MalformedFile(f"{path}: weight_map has a value that is no string")
    return weight_map
