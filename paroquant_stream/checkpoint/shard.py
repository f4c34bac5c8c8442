"""One .safetensors file of a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.descriptor import closing
from ..files.digest_cache import DigestCache, hash_file
from ..files.tensor_header import Header, read_header
from .model_files import hub_blob, open_inside

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
        """The validated header. Raises CheckpointError or MalformedFileError."""
        with closing(self.open()) as fd:
            return read_header(fd, str(self.path))

    def sha256(self, digest_cache: DigestCache) -> str:
        """SHA-256 of the whole shard, read now and remembered."""
        with closing(self.open()) as fd:
            return hash_file(fd, str(self.path), digest_cache, self.hub_sha256)

    def known_sha256(self, digest_cache: DigestCache, fd: int | None = None) -> str | None:
        """SHA-256 of the whole shard, if that is known without reading it through.

        What the Hub's cache names it by is not enough: see `DigestCache.lookup`.

        Args:
            digest_cache: Of what was hashed before.
            fd: The shard, if it is open.

        Raises:
            CheckpointError: It is absent or cannot be opened.
            MalformedFileError: It is no regular file.
        """
        if fd is None:
            with closing(self.open()) as opened:
                return self.known_sha256(digest_cache, opened)
        return digest_cache.lookup(fd, self.hub_sha256)

    @property
    def hub_sha256(self) -> str | None:
        """The SHA-256 that the Hub's cache gives in the blob's name, if it is one.

        Exactly one hop: since huggingface_hub PR 4498 the blob may itself be a link to a Xet hash,
        which is 64 hex digits too and no SHA-256. It is the server's claim about the file that it
        sent, so no identity of what lies there now.
        """
        blob = hub_blob(self.path)
        return blob.name if blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None
